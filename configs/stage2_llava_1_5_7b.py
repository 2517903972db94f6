"""Stage 2 of the LLaVA-1.5 baseline: 576 tokens an image, no pre-fusion, LLaVA-1.5's own rates.

Its paper's Table 9: batch 128, learning rate 2e-5 for everything that learns, 1 epoch.
"""

import dataclasses
import math

from configs import paper
from llava_mini_jax.config import VICUNA_7B
from llava_mini_jax.training.stages import TrainConfig

TRAINABLE = ("projector/*", "llm/*")


def config() -> TrainConfig:
    return dataclasses.replace(
        paper.stage_2(VICUNA_7B, "vicuna_v1", "out/7b-stage1/stage1/model"),
        model=paper.stage_1(VICUNA_7B, "").model,
        trainable=TRAINABLE,
        optimizer=paper.adam(2e-5),
        batch_size=128,
        steps=math.ceil(paper.INSTRUCTION_SAMPLES / 128),
    )
