"""Stage 2 of LLaVA-Mini with Vicuna-v1.5-7B: one token an image (paper Table 1)."""

from configs import paper
from llava_mini_jax.config import VICUNA_7B
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return paper.stage_2(VICUNA_7B, "vicuna_v1", "out/7b-stage1/stage1/model")
