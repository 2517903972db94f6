"""The built-in world: a LLaVA-1.5-style baseline from nothing, then LLaVA-Mini in two stages.

    captions   tower and language model learn to read pages aloud             everything
    baseline   the same model learns to answer questions: 9 patch tokens      everything
    stage1     a fresh projector is aligned on captions, tokens as they are   projector only
    stage2     compressor (one token) and pre-fusion are added                all but the tower

The first two stand for what a 7B run downloads: a tower that sees and a language model that talks.
Sizes are for two CPU cores.
"""

import dataclasses

from llava_mini_jax.config import build, image_config, prompt_config
from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.ops.rope import RopeConfig
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.optimizer import OptimizerConfig
from llava_mini_jax.training.stages import EVERYTHING, STAGE_1, STAGE_2, TrainConfig

CELL = 10  # pixels of a digit's cell, and of a patch
PAGE = 3 * CELL
WIDTH = 96

VISION = ClipConfig(
    image_size=PAGE,
    patch_size=CELL,
    width=WIDTH,
    mlp_width=3 * WIDTH,
    layers=2,
    heads=4,
    norm_eps=1e-5,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    select_layer=-1,
    select_feature="patch",
    resample="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
LLM = LlamaConfig(
    vocab_size=85,
    width=WIDTH,
    mlp_width=256,
    layers=2,
    heads=4,
    kv_heads=4,
    head_width=WIDTH // 4,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=None),
    max_positions=256,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.06,
)
BASELINE = build(
    LLM, VISION, "paper", compressor="none", prefusion_layers=0, compute_dtype="float32"
)
MINI = build(LLM, VISION, "paper", grid=1, prefusion_layers=2, compute_dtype="float32")

IMAGES = image_config("paper", VISION)
CAPTIONS = DigitsConfig(page_size=PAGE, augment=True, kinds=("caption", "read"), seed=1)
QUESTIONS = dataclasses.replace(
    CAPTIONS, kinds=("position", "row", "column", "largest"), turns=2, seed=2
)
# Without its long warm-up the model starts three times slower: Adam's first steps saturate it.
ADAM = OptimizerConfig(
    learning_rate=2e-3,
    groups=(),
    warmup_ratio=0.2,
    weight_decay=0.0,
    max_grad_norm=1.0,
    beta1=0.9,
    beta2=0.98,
    eps=1e-8,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    captions: TrainConfig
    baseline: TrainConfig
    stage1: TrainConfig
    stage2: TrainConfig


def config() -> Digits:
    captions = TrainConfig(
        name="captions",
        model=BASELINE,
        images=IMAGES,
        prompt=prompt_config("paper", "plain", LLM.max_positions),
        tokenizer="digits",
        data=CAPTIONS,
        bad_samples=0.0,
        heldout=None,
        start="fresh",
        fresh=(),
        prefusion_init="copy",
        trainable=EVERYTHING,
        optimizer=ADAM,
        steps=1200,
        batch_size=64,
        accumulate=1,
        loss_chunk=0,
        z_loss=0.0,
        max_skipped=10,
        lengths=tuple(range(8, LLM.max_positions + 1, 8)),
        scan_layers=False,
        param_dtype="float32",
        mesh=MeshConfig(),
        seed=0,
        log_every=50,
        checkpoint_every=1000,
        keep=2,
        keep_every=0,
    )
    baseline = dataclasses.replace(
        captions,
        name="baseline",
        prompt=prompt_config("paper", "brief", LLM.max_positions),
        data=QUESTIONS,
        start="previous",
        steps=700,
    )
    stage1 = dataclasses.replace(
        captions,
        name="stage1",
        start="previous",
        fresh=STAGE_1,
        trainable=STAGE_1,
        # One small layer learns alone: ten times the rate, as paper Table 9 has in stage 1.
        optimizer=dataclasses.replace(ADAM, learning_rate=2e-2, warmup_ratio=0.1),
        steps=200,
    )
    stage2 = dataclasses.replace(
        baseline,
        name="stage2",
        model=MINI,
        trainable=STAGE_2,
        optimizer=dataclasses.replace(ADAM, warmup_ratio=0.1),
        steps=1200,
    )
    return Digits(captions=captions, baseline=baseline, stage1=stage1, stage2=stage2)
