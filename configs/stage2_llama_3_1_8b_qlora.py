"""The released 8B model on data of your own, on one card of 24 GB: adapters over a base of 4 bits.

Pre-fusion exists already, so it has adapters too, as the language model does; in a stage 2 that
starts it from scratch it must be trained in full, and takes 10 GiB more (docs/finetune.md).
"""

import dataclasses

from configs import stage2_llama_3_1_8b_release
from llava_mini_jax.models.lora import LoraConfig
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    parent = stage2_llama_3_1_8b_release.config()
    return dataclasses.replace(
        parent,
        start="ICTNLP/llava-mini-llama-3.1-8b",
        lora=LoraConfig(
            rank=64, base="int4", targets=("llm/layers/*_proj", "prefusion/layers/*_proj")
        ),
        optimizer=dataclasses.replace(parent.optimizer, first_moment_dtype="bfloat16"),
        param_dtype="bfloat16",
        mesh=MeshConfig(),
        accumulate=16,
    )
