"""The paper's two stages with recent language models behind SigLIP 2: the differences.

                 configs/paper.py                 here
    tower        CLIP-L/336                       SigLIP 2, base at 256 or so400m at 384 pixels
    prompts      Vicuna's, LLaMA's                the folder's own chat template
    devices      eight                            one for models that fit 24 GB, else eight

    llava-mini convert --vision siglip2-base-patch16-256 --llm Qwen2.5-0.5B-Instruct \\
        models/qwen2.5-0.5b-start
    python train.py configs/stage1_qwen2_5_0_5b.py --workdir out/qwen2.5-0.5b-stage1
    python train.py configs/stage2_qwen2_5_0_5b.py --workdir out/qwen2.5-0.5b-stage2

Rates, batches and data are the paper's, for want of better ones: nobody has tuned them for these.
"""

import dataclasses

from configs import paper
from llava_mini_jax.config import backbone, tower_of
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.stages import TrainConfig

ONE_CARD = ("smollm2-135m", "smollm2-360m", "qwen2.5-0.5b")


def stage_1(name: str) -> TrainConfig:
    """Stage 1 of a language model of config.BACKBONES with its tower."""
    stage = paper.stage_1(backbone(name), f"models/{name}-start", tower_of(name))
    return _on_devices(name, stage)


def stage_2(name: str) -> TrainConfig:
    start = f"out/{name}-stage1/stage1/model"
    return _on_devices(name, paper.stage_2(backbone(name), "chat", start, tower_of(name)))


def _on_devices(name: str, stage: TrainConfig) -> TrainConfig:
    if name not in ONE_CARD:
        return stage
    # Eight rows of the longest bucket at a time.
    return dataclasses.replace(stage, mesh=MeshConfig(), accumulate=paper.BATCH // 8)
