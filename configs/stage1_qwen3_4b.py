"""Stage 1 of LLaVA-Mini with Qwen3-4B and SigLIP 2, so400m at 384 pixels."""

from configs import siglip2
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return siglip2.stage_1("qwen3-4b")
