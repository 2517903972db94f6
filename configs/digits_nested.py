"""The digits world for the three ways to any number of tokens, all trained in the same way.

It is digits_tables' world, with the same earlier stages, data and steps.

    python train.py configs/digits_nested.py --workdir out/prefix \
        --stage2.model.compressor.way prefix
"""

import dataclasses

from configs import digits_tables
from configs.compressors.nested import nested
from configs.digits import VISION, Digits
from llava_mini_jax.models.compressors.nested import WAYS
from llava_mini_jax.training.stages import TrainConfig

COUNTS = tuple(side * side for side in range(VISION.grid + 1))  # 0, 1, 4, 9


def ways() -> dict[str, TrainConfig]:
    """The last stage in each way."""
    parent = digits_tables.config().stage2
    return {way: nested(parent, way, COUNTS) for way in WAYS}


def config() -> Digits:
    return dataclasses.replace(digits_tables.config(), stage2=ways()["grids"])
