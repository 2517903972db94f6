"""Matryoshka M3: 1, 9, 36, 144 or 576 tokens, drawn for every row; asked for nothing, 36.

Its authors train all five in every step, five passes of the language model, and the tower too, from
LLaVA-1.5's weights on.
"""

from configs import compared
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.training.stages import TrainConfig

COUNTS = (1, 9, 36, 144, 576)


def config() -> TrainConfig:
    return compared.stage_2(M3Config(count=36, counts=COUNTS), COUNTS)
