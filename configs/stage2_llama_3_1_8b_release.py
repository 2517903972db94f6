"""Stage 2 as in the release's scripts/llavamini/train.sh; configs/release.py says what differs."""

import dataclasses
import math

from configs import paper, release, stage2_llama_3_1_8b_video
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    parent = stage2_llama_3_1_8b_video.config()
    return dataclasses.replace(
        release.released(parent, 4096),
        start="out/8b-release-stage1/stage1/model",
        optimizer=dataclasses.replace(paper.adam(1e-4), max_grad_norm=0.5),
        steps=math.ceil(2 * stage2_llama_3_1_8b_video.SAMPLES / 16),
        batch_size=16,
        accumulate=4,
        mesh=MeshConfig(fsdp=4),
    )
