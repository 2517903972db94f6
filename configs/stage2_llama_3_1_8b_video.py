"""Stage 2 of the image and video variant with LLaMA-3.1-8B-Instruct, on 3 million samples.

Section 5.1: LLaVA's 665K, Video-ChatGPT's 100K, and "part of" LLaVA-OneVision's data. Which part is
not published: list yours in `data/onevision` as Parquet files, as on the Hugging Face hub.
"""

import dataclasses
import math

from configs import paper
from llava_mini_jax.config import LLAMA_3_1_8B
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.training.stages import TrainConfig

SAMPLES = 3_000_000


def config() -> TrainConfig:
    data = SourcesConfig(
        datasets=(
            *paper.INSTRUCTIONS.datasets,
            Dataset(path="data/video_chatgpt_100k.json", images="data/activitynet"),
            Dataset(path="data/onevision"),
        ),
        video=paper.VIDEO,
    )
    return dataclasses.replace(
        paper.stage_2(LLAMA_3_1_8B, "llama_3_1", "out/8b-stage1/stage1/model"),
        data=data,
        steps=math.ceil(2 * SAMPLES / paper.BATCH),
    )
