"""The second stage of configs/smollm_digits.py without compression: LoRA behind nine patch tokens,
from the model that its first stage has left. It is what one token is compared with."""

import dataclasses

from configs import smollm_digits
from llava_mini_jax.config import prompt_config
from llava_mini_jax.training.optimizer import Group
from llava_mini_jax.training.stages import TrainConfig

LONGEST = 44  # eight more positions than with one token


def config() -> TrainConfig:
    recipe = smollm_digits.config()
    return dataclasses.replace(
        recipe.lora,
        name="stage2",
        model=smollm_digits.PATCHES,
        start="out/smollm/stage1/model",
        trainable=("projector/*", "llm/*"),
        prompt=prompt_config("paper", "chat_brief", LONGEST),
        lengths=(LONGEST,),
        data=smollm_digits.QUESTIONS,
        optimizer=dataclasses.replace(
            recipe.stage2.optimizer, groups=(Group(patterns=("llm/*",), learning_rate=5e-4),)
        ),
        steps=100,
    )
