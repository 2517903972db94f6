"""Stage 2 of LLaVA-Mini with SmolLM2-360M-Instruct and SigLIP 2, base at 256 pixels."""

from configs import siglip2
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return siglip2.stage_2("smollm2-360m")
