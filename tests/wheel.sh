#!/usr/bin/env bash
# The package as a user gets it: built, installed alone in a fresh environment, asked a question.
#     tests/wheel.sh PYTHON      PYTHON has the package and its tests' tools
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

JAX_PLATFORMS=cpu "$python" -c "
import shutil, sys
from tests import tiny_model
shutil.copytree(tiny_model.folder('paper'), sys.argv[1])
from PIL import Image
Image.new('RGB', (64, 64), 'red').save(sys.argv[2])" "$work/model" "$work/red.png"

if command -v uv >/dev/null; then
  uv build -q --out-dir "$work/dist" .
  uv venv -q --python "$python" "$work/venv"
  uv pip install -q --python "$work/venv/bin/python" -c constraints.txt "$work"/dist/*.whl
else
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q build
  "$work/venv/bin/python" -m build -q --outdir "$work/dist" . >/dev/null
  "$work/venv/bin/python" -m pip install -q -c constraints.txt "$work"/dist/*.whl
fi

# What a source distribution needs to be built, tested and read.
held=$(tar -tf "$work"/dist/*.tar.gz)
for name in pyproject.toml constraints.txt Makefile README.md CHANGELOG.md configs/digits.py \
  tests/tiny.py docs/architecture.md; do
  grep -q "/$name$" <<<"$held" || { echo "the source distribution has no $name"; exit 1; }
done

cd "$work" # where no checkout is on the path
unset PYTHONPATH
export JAX_PLATFORMS=cpu
program=$work/venv/bin/llava-mini
"$program" --help >/dev/null
answer=$("$program" ask model --image red.png "which digit is in row 1 column 2?" --max-new-tokens 4 --compilation-cache none)
test -n "$answer" || { echo "llava-mini ask said nothing"; exit 1; }
"$work/venv/bin/python" - <<'END'
import importlib.metadata as metadata
import pathlib

import llava_mini_jax

here = pathlib.Path(llava_mini_jax.__file__).parent
assert "site-packages" in str(here), here
assert (here / "py.typed").is_file(), "the wheel has no py.typed"
assert (here / "serving" / "page" / "index.html").is_file(), "the wheel has no web page"
assert (here / "evaluation" / "run" / "failures.html").is_file(), "the wheel has no page of failures"
print("llava-mini-jax", metadata.version("llava-mini-jax"), "answers from a wheel")
END
