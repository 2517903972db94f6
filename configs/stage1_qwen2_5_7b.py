"""Stage 1 of LLaVA-Mini with Qwen2.5-7B-Instruct and SigLIP 2, so400m at 384 pixels."""

from configs import siglip2
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return siglip2.stage_1("qwen2.5-7b")
