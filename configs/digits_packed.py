"""Stage 2 of the demo with several conversations in a row, from the model of its stage 1.

It is an example to try (docs/finetune.md): all pages have similar lengths, so the gain is small.
"""

import dataclasses

from configs import digits
from llava_mini_jax.data.sets.packing import PackingConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    stage = digits.config().stage2
    # All conversations are counted before the first step: not the million that the world has.
    data = dataclasses.replace(stage.data, samples=4000)
    return dataclasses.replace(
        stage,
        start="out/demo/stage1/model",
        data=data,
        batch_size=8,
        packing=PackingConfig(window=512, images=9),
    )
