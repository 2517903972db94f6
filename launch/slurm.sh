#!/usr/bin/env bash
# Slurm, GPUs: one process a node, with all of the node's GPUs.
#
#     sbatch launch/slurm.sh configs/stage2_vicuna_7b.py --workdir /shared/out/7b-stage2 \
#         --mesh.fsdp 8 --mesh.data 2
#
# Change the lines below for your cluster; the mesh has nodes x GPUs devices. Submit from the
# repository, with data/, models/ and the workdir on a disk that all nodes see.
#SBATCH --job-name=llava-mini
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM two minutes before the end. Without "B:" the processes get it, and not this script.
#SBATCH --signal=TERM@120
set -euo pipefail

# Under Slurm JAX takes one GPU a process; here a process has all of its node's.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

# A process that ends first must not have the others killed while they write their checkpoint.
status=0
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "${PYTHON:-.venv/bin/python}" train.py "$@" --distributed --stopped-status 143 || status=$?

# 143: stopped by SIGTERM, with a checkpoint. A job that scancel ends is no longer RUNNING.
if [[ $status == 143 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
