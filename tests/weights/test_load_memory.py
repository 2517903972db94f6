"""Loading a model takes the memory of the model and little more than a tensor.

    about 680 MB of bfloat16 in shards --load in its own process--> parameters
                                              |
                    a thread reads RssAnon of /proc/self/status every millisecond

RssAnon counts what the process has allocated; pages of the mapped weight files are not in it, and
the kernel takes those back when it needs them.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.config import Bundle
from llava_mini_jax.models import llava_mini
from llava_mini_jax.tensorfiles.save import save_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import published_tensors
from llava_mini_jax.weights.export_json import config_files
from llava_mini_jax.weights.lazy_params import lazy_params
from tests import tiny_model

SHARD_BYTES = 150_000_000
# Beyond the parameters: one tensor on its way from file to device, and what the allocators of
# numpy and XLA keep for a moment. A loader that held the model twice would need 4.6.
MOST_SHARDS_BESIDE = 1.3
# Weights are rounded in parts; and the programs that round take a few tens of MB.
MOST_SHARDS_BESIDE_INT8 = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]

LOAD = """
import json, sys, threading, time
from pathlib import Path
import jax
import jax.numpy as jnp
from llava_mini_jax.weights import folders, import_hf

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

folder, dtype = Path(sys.argv[1]), "bfloat16"
narrow = next((name for name in ("int8", "int4") if name in sys.argv), None)
jnp.zeros(8).block_until_ready()  # the backend's own memory is not the loader's
bundle, published = folders.open_model(folder, compute_dtype=dtype)
before = peak = anonymous_bytes()
loaded = False

def watch():
    global peak
    while not loaded:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
params = import_hf.load_params(
    bundle, published, dtype=dtype, narrow=narrow, unrolled="unrolled" in sys.argv
)
jax.block_until_ready(params)
seconds = time.perf_counter() - began
loaded = True
thread.join()
parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps(dict(before=before, peak=peak, after=anonymous_bytes(), parameters=parameters,
                      seconds=seconds)))
"""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LLaMA of three layers as wide as a 1B model's, in the release's format."""
    folder = tmp_path_factory.mktemp("big")
    bundle = big_bundle()
    spec = llava_mini.unrolled(llava_mini.spec(bundle.model))
    made = {path: random_bits(leaf.shape) for path, leaf in param_tree.paths(spec).items()}
    params = lazy_params(bundle, {}, dtype="bfloat16", made=made)
    for name, content in config_files(bundle, "release").items():
        (folder / name).write_text(json.dumps(content))
    tensors = published_tensors(params, bundle.model, names.LAYOUTS["release"])
    save_tensors(folder, tensors, max_shard_bytes=SHARD_BYTES)
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()


def big_bundle() -> Bundle:
    bundle = tiny_model.bundle("paper")
    llm = dataclasses.replace(
        bundle.model.llm,
        vocab_size=32_000,
        width=2048,
        mlp_width=5632,
        layers=3,
        heads=16,
        kv_heads=16,
        head_width=128,
    )
    model = dataclasses.replace(
        bundle.model,
        llm=llm,
        projector=dataclasses.replace(bundle.model.projector, out_width=llm.width),
        compressor=dataclasses.replace(bundle.model.compressor, width=llm.width),
        prefusion_layers=1,
        compute_dtype="bfloat16",
    )
    return dataclasses.replace(bundle, model=model)


def random_bits(shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        bits = np.random.default_rng(0).integers(0, 2**14, shape, np.uint16)  # finite numbers
        return bits.view(ml_dtypes.bfloat16)

    return make


@pytest.mark.parametrize("form", ["stacked", "unrolled", "unrolled int8"])
def test_peak_memory_is_the_parameters_and_about_one_shard(big_folder: Path, form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(big_folder), *form.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    files = {file.name: file.stat().st_size for file in big_folder.glob("*.safetensors")}
    largest = max(files.values())
    beside = found["peak"] - found["before"] - found["parameters"]
    print(
        f"{form}: {len(files)} shards, the largest {largest / 1e6:.0f} MB; parameters"
        f" {found['parameters'] / 1e6:.0f} MB, peak beside them {beside / 1e6:.0f} MB"
        f" ({beside / largest:.2f} shards), {found['seconds']:.1f} s"
    )
    assert len(files) >= 4 and found["parameters"] > (380e6 if "int8" in form else 550e6)
    most = MOST_SHARDS_BESIDE_INT8 if "int8" in form else MOST_SHARDS_BESIDE
    assert beside < most * largest
