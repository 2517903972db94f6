"""LLaVA-PruMerge+ with the authors' rule for training: 72 + 72 + 1 = 145 tokens, doubles included.

They tune LoRA adapters.
"""

from configs import compared
from llava_mini_jax.models.compressors.prumerge_plus import PruMergePlusConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    own = PruMergePlusConfig(layer=23, neighbours=32, ratio=1 / 8, variant="release")
    return compared.stage_2(own)
