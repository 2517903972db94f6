#!/usr/bin/env bash
# Cloud TPU VMs: the same command on every host of a slice.
#
#     export TPU=NAME ZONE=us-east5-b
#     launch/tpu_vm.sh install                  # once: this commit, and its packages
#     launch/tpu_vm.sh configs/stage2_vicuna_7b.py --workdir gs://BUCKET/out/7b-stage2 \
#         --mesh.fsdp 16 --accumulate 8 --model.remat attention
#     launch/tpu_vm.sh log                      # of the first host; the run itself needs no terminal
#     launch/tpu_vm.sh stop                     # with a checkpoint, as SIGTERM does it
#
# The slice exists already:
#     gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" \
#         --accelerator-type v6e-16 --version v2-alpha-tpuv6e
# data/ and models/ must be in ~/llava-mini on every host, as copies or as a mounted bucket.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

on() { # on HOST COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker="$1" --command "$2"
}

case "${1:?install, log, stop, or a config file}" in
install)
    git archive --prefix=llava-mini/ -o /tmp/llava-mini.tar HEAD
    gcloud compute tpus tpu-vm scp /tmp/llava-mini.tar "$TPU:" --zone "$ZONE" --worker=all
    on all 'tar xf llava-mini.tar && cd llava-mini && python3 -m venv .venv &&
        .venv/bin/pip install -q -c constraints.txt ".[tpu,gcs]"'
    ;;
log) on 0 'tail -n 50 -f llava-mini/train.log' ;;
stop) on all "pkill -TERM -f '[p]ython train.py'" ;; # [p]: not this command itself
*)
    command=$(printf ' %q' .venv/bin/python train.py "$@" --distributed)
    on all "cd llava-mini && { nohup$command >> train.log 2>&1 < /dev/null & }"
    ;;
esac
