"""Stage 1 of LLaVA-Mini with Vicuna-v1.5-7B; LLaVA-1.5's is the same."""

from configs import paper
from llava_mini_jax.config import VICUNA_7B
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return paper.stage_1(VICUNA_7B, "models/vicuna-7b-start")
