"""Table 7 (section 6.3): 64 tokens."""

from configs import stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), grid=8)
