"""LLaVA-Mini's stage 2 with any number of tokens: one checkpoint, and each request's own count.

Coarse grids of queries are means of the finest one's; the two other ways are --model.compressor.way
(models/compressors/nested.py). As the paper trains one token, but that each row of a batch draws
its count, so that a count is seen by a ninth of the rows.

    python train.py configs/compressors/nested.py --workdir out/nested
"""

import dataclasses

from configs import stage2_vicuna_7b
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.training.stages import TrainConfig, rebuilt

COUNTS = (0, 1, 4, 9, 16, 36, 64, 144, 576)  # of 24 x 24 patches


def nested(parent: TrainConfig, way: str, counts: tuple[int, ...] = COUNTS) -> TrainConfig:
    """`parent`'s stage with a nested compressor in place of its own; unasked, it gives 1 token."""
    width, layers = parent.model.llm.width, parent.model.prefusion_layers
    compressor = NestedConfig(way=way, width=width, counts=counts, count=1)
    stage = rebuilt(parent, compressor=compressor, prefusion_layers=layers)
    return dataclasses.replace(stage, draw_tokens=counts)


def config() -> TrainConfig:
    return nested(stage2_vicuna_7b.config(), "grids")
