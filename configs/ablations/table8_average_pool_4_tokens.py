"""Table 8: average pooling to 4 tokens."""

from configs import stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), compressor="average_pool", grid=2)
