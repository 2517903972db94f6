"""Model configurations: named parts, dialects, and what a model folder says as a Bundle.

    named parts:      build(llm=VICUNA_7B, vision=CLIP_L_336, dialect="paper", ...) --.
    model folders:    config.json (+ the tower's, + preprocessor_config.json) ---------+--> Bundle
                                                                                       |
    Bundle = model (architecture) + images (images to pixels) + prompt (text to ids)

The parts are in backbones.py, whose names are names of this module too. Hugging Face's json is read
and written in weights/ (hf_config.py, hf_processor.py, export_hf.py).
"""

import dataclasses
from typing import Any

from llava_mini_jax.backbones import (
    BACKBONES,
    CLIP_L_336,
    LLAMA_1_1B,
    LLAMA_3_1_8B,
    QWEN2_5_0_5B,
    QWEN2_5_3B,
    QWEN2_5_7B,
    QWEN3_4B,
    SIGLIP2_BASE_256,
    SIGLIP2_SO400M_384,
    SMOLLM2_1_7B,
    SMOLLM2_135M,
    SMOLLM2_360M,
    VICUNA_7B,
    VICUNA_13B,
    backbone,
    tower_of,
)
from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import compressors
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors import CompressorConfig, GridConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.projector import ProjectorConfig

__all__ = [
    "ASKING_DTYPES",
    "BACKBONES",
    "CLIP_L_336",
    "CLIP_MEAN",
    "CLIP_STD",
    "DIALECTS",
    "FLOAT_DTYPES",
    "LLAMA_1_1B",
    "LLAMA_3_1_8B",
    "NARROW_DTYPES",
    "QWEN2_5_0_5B",
    "QWEN2_5_3B",
    "QWEN2_5_7B",
    "QWEN3_4B",
    "SIGLIP2_BASE_256",
    "SIGLIP2_SO400M_384",
    "SMOLLM2_1_7B",
    "SMOLLM2_135M",
    "SMOLLM2_360M",
    "VICUNA_7B",
    "VICUNA_13B",
    "Bundle",
    "Dialect",
    "backbone",
    "build",
    "dialect_of",
    "image_config",
    "prompt_config",
    "tower_of",
]

# What parameters may be stored, trained, converted and computed in; and what they may be asked in:
# to narrow ones the weights of products are rounded as they are loaded (weights/quantize.py).
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
NARROW_DTYPES = ("int8", "int4")
ASKING_DTYPES = (*FLOAT_DTYPES, *NARROW_DTYPES)


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
    compressor: str | CompressorConfig | None = None,
    grid: int = 1,
    prefusion_layers: int = 4,
    inside_layers: int = 0,
    projector: str = "mlp2x_gelu",
    compute_dtype: str = "bfloat16",
    remat: str = "none",
) -> LlavaMiniConfig:
    """A LLaVA-Mini of these parts in a dialect ("paper" or "release", design table in docs/).

    `compressor` replaces the dialect's form ("none" and `prefusion_layers` 0 give LLaVA-1.5), or is
    another method's configuration and stands where that method does; `grid` is C, so that an image
    becomes C*C tokens. `inside_layers` moves compression and pre-fusion into the language model,
    behind that many of its layers. `remat` is what of each layer is kept for the backward pass:
    "none" of it is recomputed, or "matmuls", "attention", "full" (least memory; ops/layers.py).
    """
    if dialect not in DIALECTS:
        raise InputError(f'dialect "{dialect}" is unknown; use one of {", ".join(DIALECTS)}')
    choice = DIALECTS[dialect]
    if not isinstance(compressor, CompressorConfig):
        compressor = GridConfig(
            kind=compressor or choice.compressor,
            width=vision.width
            if choice.compress == "features" and not inside_layers
            else llm.width,
            heads=8,
            grid=grid,
            norm_eps=1e-5,
        )
    places = compressors.declare(compressor).places
    return LlavaMiniConfig(
        vision=vision,
        projector=ProjectorConfig(kind=projector, in_width=vision.width, out_width=llm.width),
        compressor=compressor,
        compress=choice.compress if choice.compress in places else places[0],
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
    """Images as `vision` wants them, padded and split in a dialect's order; k = `grid`."""
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
