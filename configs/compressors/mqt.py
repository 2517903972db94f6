"""MQT-LLaVA at 36 of 256 tokens; its authors draw the count for every batch, in two epochs."""

from configs import compared
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.models.compressors.mqt import MqtConfig


def config() -> compared.Stages:
    return compared.stages(
        MqtConfig(
            width=CLIP_L_336.width,
            out_width=VICUNA_7B.width,
            heads=16,
            queries=256,
            count=36,
            norm_eps=1e-6,
        )
    )
