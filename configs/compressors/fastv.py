"""FastV with 64 of 576 patches from layer 2 on, by which others measured it; its paper keeps half.

Its authors train nothing: `--compressor fastv` asks any LLaVA so. Here the model learns with it.
"""

from configs import compared
from llava_mini_jax.models.compressors.fastv import FastVConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return compared.stage_2(FastVConfig(layer=2, keep=64, variant="drop"))
