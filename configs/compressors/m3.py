"""Matryoshka M3 at 36 tokens: one of its counts, where its authors train all five in every step.

They also train the tower, from LLaVA-1.5's weights on.
"""

from configs import compared
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return compared.stage_2(M3Config(count=36))
