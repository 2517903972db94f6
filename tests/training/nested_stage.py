"""A config of one small stage in which rows draw how many vision tokens they take."""

import dataclasses

from configs.compressors.nested import nested
from configs.digits_nested import COUNTS
from llava_mini_jax.training.stages import TrainConfig
from tests.training import one_stage


def config() -> TrainConfig:
    small = dataclasses.replace(one_stage.config(), steps=4, checkpoint_every=2)
    return nested(small, "grids", COUNTS)
