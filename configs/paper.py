"""The paper's two stages (section 4.3, Table 9) as functions of the language model.

The other files of this folder are runs; each says how it differs from these. Folders are
examples, relative to where train.py is started; give your own with --start, --data and --tokenizer.

    llava-mini convert --vision CLIP --llm VICUNA models/vicuna-7b-start --dialect paper
    python train.py configs/stage1_vicuna_7b.py --workdir out/7b-stage1
    python train.py configs/stage2_vicuna_7b.py --workdir out/7b-stage2

Not in the paper, and so ours or LLaVA's: betas and eps (torch's defaults, which the release uses),
clipping at 1 (LLaVA-1.5's scripts; the release's at 0.5), pre-fusion that starts as a copy of the
language model's first layers (the release's starts fresh), and the data's paths.
"""

import dataclasses
import math

from llava_mini_jax.config import CLIP_L_336, build, image_config, prompt_config
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.optimizer import Group, OptimizerConfig
from llava_mini_jax.training.stages import STAGE_1, STAGE_2, TrainConfig

VIDEO = FrameSampling(fps=1.0, max_frames=64)
CAPTIONS = SourcesConfig(
    datasets=(Dataset(path="data/blip_laion_cc_sbu_558k.json", images="data/pretrain"),),
    video=VIDEO,
)
CAPTION_SAMPLES = 558_128
INSTRUCTIONS = SourcesConfig(
    datasets=(Dataset(path="data/llava_v1_5_mix665k.json", images="data/finetune"),),
    video=VIDEO,
)
INSTRUCTION_SAMPLES = 665_298
BATCH = 256
LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048)


def adam(learning_rate: float, projector_rate: float | None = None) -> OptimizerConfig:
    """Table 9: cosine decay, 3 % warm-up; its "MM Learning Rate" is the projector's."""
    groups = ()
    if projector_rate is not None:
        groups = (Group(patterns=STAGE_1, learning_rate=projector_rate),)
    return OptimizerConfig(
        learning_rate=learning_rate,
        groups=groups,
        warmup_ratio=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
    )


def stage_1(llm: LlamaConfig, start: str, vision: ClipConfig = CLIP_L_336) -> TrainConfig:
    """Vision-language pretraining: patches as they are, only the projector learns; 1 epoch."""
    return TrainConfig(
        name="stage1",
        model=build(llm, vision, "paper", compressor="none", prefusion_layers=0, remat="full"),
        images=image_config("paper", vision),
        prompt=prompt_config("paper", "plain", LENGTHS[-1]),
        tokenizer=start,
        data=CAPTIONS,
        bad_samples=0.001,
        heldout=None,
        start=start,
        fresh=STAGE_1,
        prefusion_init="copy",
        trainable=STAGE_1,
        optimizer=adam(1e-3),
        steps=math.ceil(CAPTION_SAMPLES / BATCH),
        batch_size=BATCH,
        accumulate=4,
        loss_chunk=256,
        z_loss=0.0,
        max_skipped=10,
        lengths=LENGTHS,
        scan_layers=True,
        param_dtype="float32",
        mesh=MeshConfig(fsdp=8),
        seed=0,
        log_every=10,
        checkpoint_every=500,
        keep=2,
        keep_every=0,
    )


def stage_2(
    llm: LlamaConfig, template: str, start: str, vision: ClipConfig = CLIP_L_336
) -> TrainConfig:
    """Instruction tuning: compressor and pre-fusion are new, all but the tower learns; 2 epochs."""
    return dataclasses.replace(
        stage_1(llm, start, vision),
        name="stage2",
        model=build(llm, vision, "paper", grid=1, prefusion_layers=4, remat="full"),
        prompt=prompt_config("paper", template, LENGTHS[-1]),
        data=INSTRUCTIONS,
        fresh=(),
        trainable=STAGE_2,
        optimizer=adam(1e-4, projector_rate=1e-5),
        steps=math.ceil(2 * INSTRUCTION_SAMPLES / BATCH),
    )
