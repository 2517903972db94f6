"""Table 7 (section 6.3): 64 tokens."""

from configs import stage2_vicuna_7b
from configs.paper import rebuilt
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), grid=8)
