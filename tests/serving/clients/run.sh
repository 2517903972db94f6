#!/usr/bin/env bash
# make serve-check: third-party clients against `llava-mini serve`, each in an environment of its own.
#   tests/serving/clients/run.sh PYTHON [OUT]      PYTHON: this project's
# Needs a network once, for .venv-aiperf and .venv-evalscope (2 GB) and for lmms-eval in .venv-lmms:
# 2 GB with SERVE_TORCH=torch==VERSION+cpu, 7 GB with what PyPI has. SERVE_MODEL names another model.
set -euo pipefail
cd "$(dirname "$0")/../../.."
root=$PWD
python=$(realpath -s "$1")
out=${2:-out/serve-check}
model=${SERVE_MODEL:-out/demo/stage2/model}
requests=${SERVE_REQUESTS:-200}
items=20 # of lmms-eval
port=${SERVE_PORT:-8019}
url=http://127.0.0.1:$port
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONPATH=. PIP_DISABLE_PIP_VERSION_CHECK=1

install() { # install NAME REQUIREMENT...
  local name=$1 && shift
  [ -e ".venv-$name/.installed" ] && return
  echo "installing $1 into .venv-$name"
  "$python" -m venv ".venv-$name" && ".venv-$name/bin/pip" install -q "$@" && touch ".venv-$name/.installed"
}
install aiperf "aiperf==0.13.0"
install evalscope "evalscope[perf]==1.14.1"
# lmms-eval without its list, which has training, audio and video that asking a server does not import.
install lmms "${SERVE_TORCH:-torch}" accelerate datasets evaluate "filelock<4" jinja2 jsonlines loguru numexpr \
    openai pillow pydantic pytablewriter python-dotenv pytz pyyaml sacrebleu scikit-learn tenacity tqdm transformers
.venv-lmms/bin/pip install -q --no-deps "lmms-eval==0.7.3"

rm -rf "$out" && mkdir -p "$out"
if [ ! -d "$model" ]; then
  echo "there is no $model (make demo): a tiny model of random weights takes its place"
  model=$out/random
  "$python" -c "import shutil, sys; from tests import tiny_model; shutil.copytree(tiny_model.folder('paper'), sys.argv[1])" "$model" 2>/dev/null
fi
# Clients count tokens themselves, and EvalScope writes prompts by a template of its own.
mkdir "$out/tokenizer" && cp "$model"/tokenizer* "$out/tokenizer"
"$python" - "$out/tokenizer/tokenizer_config.json" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))
config["chat_template"] = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
json.dump(config, open(sys.argv[1], "w"))
PY

server=
trap '[ -z "$server" ] || kill "$server"' EXIT
start() { # start SLOTS
  "$python" -m llava_mini_jax serve "$model" --port "$port" --served-model-name served --slots "$1" \
      2>>"$out/server-$1.log" & server=$!
  for _ in $(seq 600); do
    curl -sf -o /dev/null "$url/ready" && return
    kill -0 "$server" || { cat "$out/server-$1.log"; exit 1; }
    sleep 0.5
  done
  echo "the server has not become ready"; exit 1
}
stop() { kill "$server"; wait "$server"; server=; } # fails where the server does not end with 0

aiperf() { # aiperf FOLDER CONCURRENCY
  # A path with ./ in front: any other it looks up on the hub. Every answer has as many tokens.
  curl -sf "$url/metrics" >"$out/$1.before"
  (cd "$out" && "$root/.venv-aiperf/bin/aiperf" profile --model served --url "$url" \
      --endpoint-type chat --streaming --tokenizer ./tokenizer --use-server-token-count \
      --synthetic-input-tokens-mean 12 --output-tokens-mean 8 --extra-inputs ignore_eos:true \
      --image-width-mean 64 --image-height-mean 64 --concurrency "$2" --request-count "$requests" \
      --warmup-request-count 16 --random-seed 1 --ui none --artifact-dir "$1" >"$1.log" 2>&1) \
      || { tail -n 40 "$out/$1.log"; exit 1; }
  curl -sf "$url/metrics" >"$out/$1.after"
}

lmms() { # the questions of eval.py's own answers, which are in OUT/local
  mkdir "$out/lmms" && "$python" tests/serving/clients/lmms.py write "$out/lmms" "$items"
  (cd "$out/lmms" && HF_HOME=$PWD/home HF_HUB_OFFLINE=1 "$root/.venv-lmms/bin/python" -m lmms_eval eval \
      --model openai --model_args "model=served,base_url=$url/v1,api_key=none,timeout=600" \
      --tasks digits_served --include_path "$root/tests/serving/clients/lmms_digits" \
      --output_path answers --log_samples >../lmms.log 2>&1) || { tail -n 40 "$out/lmms.log"; exit 1; }
}

"$python" eval.py --model "$model" --benchmarks digits --limit "$items" --out "$out/local" \
    >"$out/local.log" 2>&1 || { tail -n 40 "$out/local.log"; exit 1; }
start 16
lmms
aiperf aiperf-16 16
aiperf aiperf-1 1
.venv-evalscope/bin/evalscope perf --url "$url/v1/chat/completions" --model served --api openai \
    --dataset random_vl --tokenizer-path "$out/tokenizer" --max-tokens 8 --min-tokens 8 \
    --min-prompt-length 8 --max-prompt-length 12 --prefix-length 0 --image-width 64 --image-height 64 \
    --image-num 1 --parallel 16 --number "$requests" --outputs-dir "$out/evalscope" \
    >"$out/evalscope.log" 2>&1 || { tail -n 40 "$out/evalscope.log"; exit 1; }
stop
start 1 # one request at a time, as workers without batches answer
aiperf aiperf-16-alone 16
stop
status=0
"$python" tests/serving/clients/table.py "$out" "$requests" || status=1
"$python" tests/serving/clients/lmms.py compare "$out/lmms" "$out/local" "$items" | tee -a "$out/table.md" || status=1
exit $status
