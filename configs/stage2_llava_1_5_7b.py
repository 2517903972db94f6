"""Stage 2 of the LLaVA-1.5 baseline: 576 tokens an image, no pre-fusion, LLaVA-1.5's own rates.

Its paper's Table 9: batch 128, learning rate 2e-5 for everything that learns, 1 epoch.
"""

import dataclasses
import math

from configs import paper, stage2_vicuna_7b
from llava_mini_jax.training.stages import TrainConfig, rebuilt


def config() -> TrainConfig:
    return dataclasses.replace(
        rebuilt(stage2_vicuna_7b.config(), compressor="none", prefusion_layers=0),
        optimizer=paper.adam(2e-5),
        batch_size=128,
        steps=math.ceil(paper.INSTRUCTION_SAMPLES / 128),
    )
