"""Stage 2 of LLaVA-Mini-HD: 672 pixels, four parts and the whole, 64 tokens (section 4.2)."""

import dataclasses

from configs import paper
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B, build
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    stage = paper.stage_2(VICUNA_7B, "vicuna_v1", "out/7b-stage1/stage1/model")
    model = build(VICUNA_7B, CLIP_L_336, "paper", grid=8, prefusion_layers=4, remat=True)
    return dataclasses.replace(
        stage, model=model, images=dataclasses.replace(paper.IMAGES, grid=2), accumulate=16
    )
