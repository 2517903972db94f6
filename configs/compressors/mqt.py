"""MQT-LLaVA: any even number of its 256 tokens, drawn for every row; asked for nothing, 36.

Its authors draw the number for every batch and device, and train two epochs.
"""

import dataclasses

from configs import compared
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.models.compressors.mqt import MqtConfig

COUNTS = tuple(range(2, 257, 2))


def config() -> compared.Stages:
    every = MqtConfig(
        width=CLIP_L_336.width,
        out_width=VICUNA_7B.width,
        heads=16,
        queries=256,
        count=256,
        norm_eps=1e-6,
    )
    return compared.stages(every, dataclasses.replace(every, count=36, counts=COUNTS), COUNTS)
