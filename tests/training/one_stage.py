"""A config file of one small stage, for training runs in processes of their own."""

import dataclasses

from llava_mini_jax.training.stages import TrainConfig
from tests.training import tiny_stages


def config() -> TrainConfig:
    """Stage 2 from fresh parameters: compressor, pre-fusion and language model learn."""
    *_, stage2 = tiny_stages.stages()
    return dataclasses.replace(
        stage2, start="fresh", steps=20, log_every=1, checkpoint_every=10, keep=10
    )
