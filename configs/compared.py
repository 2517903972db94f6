"""Other methods' compressors, trained as LLaVA-1.5 is (docs/architecture.md, "Compressors").

Each file of configs/compressors/ names one method. All share tower, data, order, epochs, batch
size and learning rates; each file says how its authors trained differently. A compressor that
replaces the projector has its own stage 1; the others start from LLaVA's.

    python train.py configs/compressors/mqt.py --workdir out/mqt
"""

import dataclasses

from configs import stage1_vicuna_7b, stage2_llava_1_5_7b
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.training.stages import TrainConfig, rebuilt

COMPRESSOR = ("compressor/*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    stage1: TrainConfig
    stage2: TrainConfig


def stage_2(compressor: CompressorConfig, draw_tokens: tuple[int, ...] = ()) -> TrainConfig:
    """Instruction tuning of a method that keeps LLaVA's projector, from LLaVA's stage 1."""
    return _tuned(compressor, draw_tokens)


def stages(
    aligned: CompressorConfig,
    tuned: CompressorConfig | None = None,
    draw_tokens: tuple[int, ...] = (),
) -> Stages:
    """Alignment and instruction tuning of a method that is the projector: of one configuration, or
    of `tuned` behind `aligned`, which have the same parameters."""
    parent = dataclasses.replace(stage1_vicuna_7b.config(), trainable=COMPRESSOR, fresh=COMPRESSOR)
    return Stages(
        stage1=rebuilt(parent, compressor=aligned, prefusion_layers=0),
        stage2=dataclasses.replace(_tuned(tuned or aligned, draw_tokens), start="previous"),
    )


def _tuned(compressor: CompressorConfig, draw_tokens: tuple[int, ...]) -> TrainConfig:
    parent = stage2_llava_1_5_7b.config()
    trainable = (*parent.trainable, *COMPRESSOR)
    parent = dataclasses.replace(parent, trainable=trainable, draw_tokens=draw_tokens)
    return rebuilt(parent, compressor=compressor, prefusion_layers=0)
