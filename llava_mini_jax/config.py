"""Model configurations: named parts, dialects, and what a model folder says as a Bundle.

    named models:     build(llm=VICUNA_7B, vision=CLIP_L_336, dialect="paper", ...) --.
    model folders:    config.json (+ the tower's, + preprocessor_config.json) ---------+--> Bundle
                                                                                       |
    Bundle = model (architecture) + images (pictures to pixels) + prompt (text to ids)

Hugging Face's json is read and written in weights/ (hf_config.py, hf_processor.py, export_hf.py).
"""

import dataclasses
from typing import Any

from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressor import CompressorConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.projector import ProjectorConfig
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig

# What parameters may be stored, trained, converted and computed in; and what they may be asked in:
# int8 rounds the weights of products as they are loaded (weights/quantize.py), and is no format.
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
ASKING_DTYPES = (*FLOAT_DTYPES, "int8")

CLIP_L_336 = ClipConfig(
    image_size=336,
    patch_size=14,
    width=1024,
    mlp_width=4096,
    layers=24,
    heads=16,
    norm_eps=1e-5,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    select_layer=-2,
    select_feature="patch",
    resample="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
)

VICUNA_7B = LlamaConfig(
    vocab_size=32000,
    width=4096,
    mlp_width=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_width=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=None),
    max_positions=4096,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

VICUNA_13B = dataclasses.replace(
    VICUNA_7B, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40
)

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    width=4096,
    mlp_width=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    norm_eps=1e-5,
    rope=RopeConfig(
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    max_positions=131072,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

# TinyLlama: small enough to be timed on a CPU.
LLAMA_1_1B = dataclasses.replace(
    VICUNA_7B, width=2048, mlp_width=5632, layers=22, kv_heads=4, head_width=64
)

# Published language models, by the name that commands take.
BACKBONES = {
    "vicuna-7b": VICUNA_7B,
    "vicuna-13b": VICUNA_13B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-1.1b": LLAMA_1_1B,
}


def backbone(name: str) -> LlamaConfig:
    """A published language model; InputError for a name that is unknown."""
    if name not in BACKBONES:
        raise InputError(f'backbone "{name}" is unknown; use one of {", ".join(BACKBONES)}')
    return BACKBONES[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """Everything that a model folder's config says."""

    model: LlavaMiniConfig
    images: ImageConfig
    prompt: PromptConfig
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """Where the paper and the release differ (design table in docs/architecture.md)."""

    compressor: str
    compress: str
    fuse_compressed: bool
    detach_text: bool


DIALECTS = {
    "paper": Dialect(
        compressor="similarity", compress="projected", fuse_compressed=False, detach_text=False
    ),
    "release": Dialect(
        compressor="multi_head", compress="features", fuse_compressed=True, detach_text=True
    ),
}
_PROMPT_DIALECTS: dict[str, dict[str, Any]] = {
    "paper": dict(fuse_answers=False, fuse_id_zero=True, double_bos=False, blank_image=False),
    "release": dict(fuse_answers=True, fuse_id_zero=False, double_bos=True, blank_image=False),
}


def build(
    llm: LlamaConfig,
    vision: ClipConfig,
    dialect: str,
    *,
    compressor: str | None = None,
    grid: int = 1,
    prefusion_layers: int = 4,
    inside_layers: int = 0,
    projector: str = "mlp2x_gelu",
    compute_dtype: str = "bfloat16",
    remat: str = "none",
) -> LlavaMiniConfig:
    """A LLaVA-Mini of these parts in a dialect ("paper" or "release", design table in docs/).

    `compressor` replaces the dialect's form ("none" and `prefusion_layers` 0 give LLaVA-1.5);
    `grid` is C, so that an image becomes C*C tokens. `inside_layers` moves compression and
    pre-fusion into the language model, behind that many of its layers. `remat` is
    what of each layer is kept for the backward pass: "none" of it is recomputed, or "matmuls",
    "attention", "full" (least memory; ops/layers.py).
    """
    if dialect not in DIALECTS:
        raise InputError(f'dialect "{dialect}" is unknown; use one of {", ".join(DIALECTS)}')
    choice = DIALECTS[dialect]
    return LlavaMiniConfig(
        vision=vision,
        projector=ProjectorConfig(kind=projector, in_width=vision.width, out_width=llm.width),
        compressor=CompressorConfig(
            kind=compressor or choice.compressor,
            width=vision.width
            if choice.compress == "features" and not inside_layers
            else llm.width,
            heads=8,
            grid=grid,
            norm_eps=1e-5,
        ),
        compress=choice.compress,
        prefusion_layers=0 if inside_layers else prefusion_layers,
        fuse_compressed=choice.fuse_compressed,
        detach_text=choice.detach_text,
        inside_layers=inside_layers,
        llm=llm,
        compute_dtype=compute_dtype,
        remat=remat,
    )


def prompt_config(
    dialect: str, template: str, max_length: int, padding_side: str = "right"
) -> PromptConfig:
    """The habits of a dialect, with its template and length."""
    return PromptConfig(
        template=template,
        max_length=max_length,
        padding_side=padding_side,
        **_PROMPT_DIALECTS[dialect],
    )


def image_config(dialect: str, vision: ClipConfig, *, grid: int = 1) -> ImageConfig:
    """Pictures as `vision` wants them, padded and split in a dialect's order; k = `grid`."""
    return ImageConfig(
        size=vision.image_size,
        aspect="pad",
        grid=grid,
        split="pad_then_split" if dialect == "paper" else "split_then_pad",
        repeat_whole=False,
        mean=vision.mean,
        std=vision.std,
        resample=vision.resample,
    )


def dialect_of(cfg: LlavaMiniConfig) -> str:
    """A word for people: which dialect a configuration is, or what it mixes."""
    if cfg.compressor.kind == "none" and cfg.prefusion_layers == 0:
        return "llava-1.5 (no compression, no pre-fusion)"
    if cfg.inside_layers:
        return f"compression inside the LLM after layer {cfg.inside_layers} (paper E.3)"
    for name, choice in DIALECTS.items():
        if (
            cfg.compressor.kind == choice.compressor
            and cfg.compress == choice.compress
            and cfg.fuse_compressed == choice.fuse_compressed
        ):
            return name
    return f"variant (compressor {cfg.compressor.kind}, {cfg.prefusion_layers} pre-fusion layers)"
