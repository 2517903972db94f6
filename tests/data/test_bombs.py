"""Image bombs: each ends as an image or one sentence, in seconds and a few hundred megabytes."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.data.bombs import KINDS

SECONDS = 5.0  # of processor time, so that a busy machine passes
MEGABYTES = 700  # at the peak; the limit of an image's steps is 512 MiB, the rest is the program
SCRIPT = """
import json, resource, sys, time, warnings
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.errors import InputError
from tests.peak import peak_kilobytes
cfg = dict(size=336, grid=1, split="split_then_pad", repeat_whole=False)
cfg |= dict(mean=(0.5,) * 3, std=(1,) * 3, resample="bicubic")
began, told = time.process_time(), ""
try:
    image = load_image(sys.argv[1])
    for aspect in ("pad", "crop", "squeeze"):
        preprocess(image, ImageConfig(aspect=aspect, **cfg))
except InputError as error:
    told = str(error)
peak = peak_kilobytes() / 1024
print(json.dumps({"seconds": time.process_time() - began, "peak": peak, "told": told}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_bomb(kind, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(KINDS[kind]())
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, path], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["seconds"] < SECONDS and found["peak"] < MEGABYTES, found
    assert "\n" not in found["told"] and len(found["told"]) < 500
    assert not found["told"] or str(path) in found["told"] or "pixels" in found["told"]
