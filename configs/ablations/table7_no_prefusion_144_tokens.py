"""Tables 7 (section 6.1) and 10: compression to 144 tokens without pre-fusion."""

from configs import stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), grid=12, prefusion_layers=0)
