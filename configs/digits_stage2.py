"""Stage 2 of the demo alone, from the model that its stage 1 has left: for runs beside each other,
such as those of docs/finetune.md that differ in `--lora`."""

import dataclasses

from configs import digits
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return dataclasses.replace(digits.config().stage2, start="out/demo/stage1/model")
