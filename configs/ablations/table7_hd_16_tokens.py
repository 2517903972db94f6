"""Table 7 (section 6.3): 672 pixels, 16 tokens."""

from configs import stage2_vicuna_7b_hd
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b_hd.config(), grid=4)
