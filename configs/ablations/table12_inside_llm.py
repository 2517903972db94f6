"""Table 12: compression and pre-fusion within the language model, one token.

The paper does not say behind which layer; 4 is where its 1.84 TFLOPs come out (1.88 by its rule),
and is how many pre-fusion layers the parent has.
"""

from configs import stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return rebuilt(stage2_vicuna_7b.config(), grid=1, inside_layers=4)
