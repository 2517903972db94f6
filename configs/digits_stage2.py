"""Stage 2 of configs/digits_tables.py alone, from the model of its first seed's stage 1: for runs
that differ in one field, such as those of docs/finetune.md that differ in `--lora`."""

import dataclasses

from configs import digits_tables
from llava_mini_jax.training.stages import TrainConfig

START = "out/reproduce/digits/stage1-seed0/stage1/model"  # of llava-mini reproduce


def config() -> TrainConfig:
    return dataclasses.replace(digits_tables.config().stage2, start=START)
