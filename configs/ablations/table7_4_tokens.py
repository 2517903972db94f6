"""Tables 7 (section 6.3) and 8: query-based compression to 4 tokens."""

from configs import stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), grid=2)
