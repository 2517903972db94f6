"""What every test starts from: JAX on eight virtual CPU devices, and the folder of golden files.

This file is read before any test imports JAX, so a test file may simply `import jax`.
"""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of a test's time; other files and a second run find its programs here, and so do
# the programs that tests start. Programs that compile quickly are not worth a file.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
# XLA's older emitters compile small programs for CPUs in a third of the time. XLA ends a process
# whose flags it does not know, and jaxlib 0.11 no longer knows this one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

from tests import golden_data, long_tests

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 8)


def lower_in_one_thread() -> None:
    """With jax 0.10, lowering takes a third to a half of the time where MLIR expects one thread.

    JAX gives each program a context that shares a pool of threads, which small programs never use,
    and has no public option for it. Later versions lower as quickly without this.
    """
    from jax._src.interpreters import mlir

    make = mlir.make_ir_context

    def make_ir_context() -> object:
        context = make()
        context.enable_multithreading(False)
        return context

    mlir.make_ir_context = make_ir_context


if jax.__version__.startswith("0.10."):
    lower_in_one_thread()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", type=Path, help=golden_data.HELP)


def pytest_configure(config: pytest.Config) -> None:
    if (given := config.getoption("--golden")) is not None:
        try:
            golden_data.use(given)
        except NotADirectoryError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long_tests.mark(items)


# Every compiled program maps a few pieces of memory, of which Linux allows a process 65,530. Long
# before that, the garbage collector spends its time on what JAX keeps of each program.
MOST_MAPS = 8_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Forgets compiled programs behind a test file, once there are very many: at the limit the
    next compilation is a segmentation fault."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Outputs of the authors' release and of the official scorers, kept beside the repository."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files are not beside this repository")
    return folder
