"""Stage 2 of LLaVA-Mini with SmolLM2-1.7B-Instruct and SigLIP 2, so400m at 384 pixels."""

from configs import siglip2
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return siglip2.stage_2("smollm2-1.7b")
