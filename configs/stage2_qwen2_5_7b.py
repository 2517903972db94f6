"""Stage 2 of LLaVA-Mini with Qwen2.5-7B-Instruct and SigLIP 2, so400m at 384 pixels."""

from configs import siglip2
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return siglip2.stage_2("qwen2.5-7b")
