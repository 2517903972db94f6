"""The run that the tests of the loop, of its checkpoints and of its interruptions compare with."""

import jax
import pytest

from tests.training import tiny_stages
from tests.training.runs import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(workdir, parameters) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    # As tiny.fast_compilation has it, which is not in force yet: a continued run has to be compiled
    # alike to end with the same bits.
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    finals = run(tiny_stages.stages(), folder)
    jax.config.update("jax_disable_most_optimizations", before)
    return folder, finals
