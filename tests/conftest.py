"""What every test starts from: JAX on eight virtual CPU devices, and the folder of golden files.

This file is read before any test imports JAX, so a test file may simply `import jax`.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of a test's time; a second run finds its programs here. Programs that compile
# quickly are not worth a file.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Outputs of the authors' release and of the official scorers, kept beside the repository."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files are not beside this repository")
    return folder
