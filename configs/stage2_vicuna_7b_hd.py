"""Stage 2 of LLaVA-Mini-HD: 672 pixels, four parts and the whole, 64 tokens (section 4.2)."""

import dataclasses

from configs import stage2_vicuna_7b
from llava_mini_jax.config import CLIP_L_336, image_config
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    images = image_config("paper", CLIP_L_336, grid=2)
    parent = dataclasses.replace(stage2_vicuna_7b.config(), images=images)
    return rebuilt(parent, grid=8)
