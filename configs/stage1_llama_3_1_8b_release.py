"""Stage 1 as the release's adapter switch does it: compressor and pre-fusion are trained too.

The release has no script for it; rates, batch and data are those of LLaVA's pretraining.
"""

import dataclasses

from configs import release, stage1_llama_3_1_8b
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return dataclasses.replace(
        release.released(stage1_llama_3_1_8b.config(), 2048),
        trainable=release.ADAPTER,
        fresh=release.ADAPTER,
    )
