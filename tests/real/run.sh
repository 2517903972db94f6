#!/usr/bin/env bash
# make real-check: folders written by transformers itself, opened here, exported, opened there; and an
# adapter that training leaves here, opened by PEFT.
#   tests/real/run.sh PYTHON [OUT]      PYTHON: this project's
# Needs a network once, for torch and three minor versions of transformers in .venv-real: 1.6 GB with
# REAL_TORCH=torch==VERSION+cpu; what PyPI has brings 5 GB of CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
out=${2:-out/real-check}
versions=${REAL_VERSIONS:-5.22 5.23 5.24}
env=.venv-real
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONPATH=. PIP_DISABLE_PIP_VERSION_CHECK=1

if [ ! -e "$env/.installed" ]; then
  echo "installing torch and transformers into $env"
  "$python" -m venv "$env"
  "$env/bin/pip" install -q "${REAL_TORCH:-torch}" "transformers==${versions##* }.*" pillow sentencepiece protobuf peft
  for version in $versions; do # the others beside it: they need the same libraries
    "$env/bin/pip" install -q --no-deps --target "$env/transformers-$version" "transformers==$version.*"
  done
  touch "$env/.installed"
fi

status=0
for version in $versions; do
  folder=$out/$version
  rm -rf "$folder" && mkdir -p "$folder"
  there() { PYTHONPATH=$env/transformers-$version "$env/bin/python" "$@"; }
  there tests/real/peers.py "$folder" >"$folder/peers.log" 2>&1 || { tail -n 20 "$folder/peers.log"; exit 1; }
  "$python" tests/real/check.py "$folder" >"$folder/check.log" 2>&1 || status=1
  there tests/real/back.py "$folder" 2>"$folder/back.log" || status=1
done
adapter=$out/adapter
rm -rf "$adapter" && mkdir -p "$adapter"
"$python" -m tests.real.adapter "$adapter" >"$adapter/train.log" 2>&1 || { tail -n 5 "$adapter/train.log"; exit 1; }
"$env/bin/python" tests/real/peft_back.py "$adapter" 2>"$adapter/back.log" || status=1
"$python" tests/real/table.py "$out" $versions >"$out/table.md"
echo "the table is $out/table.md"
exit $status
