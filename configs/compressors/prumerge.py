"""LLaVA-PruMerge with each image's own number of tokens (145 at most, about 32 on average).

Its authors share one ratio among a batch, which padding would change, and tune LoRA adapters.
"""

from configs import compared
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return compared.stage_2(PruMergeConfig(layer=23, neighbours=32, ratio=0.0, variant="clean"))
