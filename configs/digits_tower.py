"""The first stage of the demo alone: the tower that configs/smollm_digits.py begins with."""

from configs import digits
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return digits.config().captions
