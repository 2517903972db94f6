"""Stage 1 of LLaVA-Mini with LLaMA-3.1-8B-Instruct."""

from configs import paper
from llava_mini_jax.config import LLAMA_3_1_8B
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return paper.stage_1(LLAMA_3_1_8B, "models/llama-3.1-8b-start")
