"""The four stages of configs/digits.py, so small that compiling them is most of their time."""

import dataclasses

from configs import digits
from llava_mini_jax.config import build
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.training.stages import TrainConfig, stages_of

STEPS = {"captions": 2, "baseline": 2, "stage1": 3, "stage2": 8}


def stages() -> list[TrainConfig]:
    return [
        dataclasses.replace(
            stage,
            model=_smaller(stage.model),
            data=dataclasses.replace(stage.data, augment=False),
            steps=STEPS[stage.name],
            batch_size=8,
            prompt=dataclasses.replace(stage.prompt, max_length=96),
            lengths=(96,),  # one bucket: a stage compiles once
            log_every=2,
            checkpoint_every=2,
        )
        for stage in stages_of(digits.config())
    ]


def _smaller(model: LlavaMiniConfig) -> LlavaMiniConfig:
    vision = dataclasses.replace(model.vision, width=32, mlp_width=48, layers=1, heads=4)
    llm = dataclasses.replace(
        model.llm, width=32, mlp_width=48, layers=1, heads=4, kv_heads=2, head_width=8
    )
    return build(
        llm,
        vision,
        "paper",
        compressor=model.compressor.kind,
        prefusion_layers=min(model.prefusion_layers, 1),
        compute_dtype="float32",
    )
