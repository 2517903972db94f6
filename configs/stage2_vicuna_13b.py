"""Stage 2 of LLaVA-Mini with Vicuna-v1.5-13B."""

from configs import paper
from llava_mini_jax.config import VICUNA_13B
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return paper.stage_2(VICUNA_13B, "vicuna_v1", "out/13b-stage1/stage1/model")
