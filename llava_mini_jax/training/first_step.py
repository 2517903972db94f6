"""The program of a stage's steps, compiled by a thread while what the stage starts from is read.

    shapes of the state, of a likely batch --lower--> thread: compile --wait--> the first step

JAX keeps what it has compiled for these shapes, and the step finds it.
"""

import threading
from typing import Any

import jax

from llava_mini_jax import compilation
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.training import step_program
from llava_mini_jax.training.stages import TrainConfig
from llava_mini_jax.training.step import TrainState, train_step


def fixed(stage: TrainConfig, optimizer: Any) -> dict[str, Any]:
    """`train_step`'s settings, the same in all steps of a stage."""
    return {
        "cfg": stage.model,
        "optimizer": optimizer,
        "accumulate": stage.accumulate,
        "loss_chunk": stage.loss_chunk,
        "z_loss": stage.z_loss,
    }


def likely_batch(stage: TrainConfig) -> TrainBatch:
    """The shapes of the batch that most are: a large one has a row of the longest bucket.

    A quarter of the text, at most, takes part in pre-fusion: the rest is answers and padding. Where
    that is wrong, the step compiles its own program, as if none had been compiled here.
    """
    shape = step_program.shape_of(stage, step_program.images_of(stage), stage.lengths[-1] // 4)
    return step_program.abstract_batch(stage, shape)


class FirstStep:
    """Compiles the step for `likely_batch`, where threads pay."""

    def __init__(self, stage: TrainConfig, state: TrainState, optimizer: Any):
        """`state` is abstract."""
        self._thread: threading.Thread | None = None
        # Processes with GPUs measure kernels together: they have to compile in the same order.
        together = jax.process_count() > 1 and jax.default_backend() == "gpu"
        if together or stage.model.inside_layers or not compilation.threads_pay():
            return
        batch = likely_batch(stage)
        self._shapes = _shapes(batch)
        lowered = train_step.lower(state, batch, **fixed(stage, optimizer))
        self._thread = threading.Thread(target=_compile, args=[lowered], daemon=True)
        self._thread.start()

    def wait(self, batch: TrainBatch) -> None:
        """Until the program for `batch` is there, if it is the one that is compiled."""
        if self._thread is not None and _shapes(batch) == self._shapes:
            self._thread.join()
            self._thread = None


def _shapes(batch: TrainBatch) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(batch)]


def _compile(lowered: Any) -> None:
    try:
        lowered.compile()
    except Exception:
        return  # the step will say it
