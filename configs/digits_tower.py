"""The first stage of the demo alone, and twice as long: the tower of configs/smollm_digits.py."""

import dataclasses

from configs import digits
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    captions = digits.config().captions
    return dataclasses.replace(captions, steps=2 * captions.steps)
