"""What each compressor costs: once for an image, and again for every question about it.

    tower, language model --full_size--> a configuration of each method
    configuration, text of a question --formulas, traces (network.py)--> Cost
        first   a question about a new image
        turn    the next one: its text alone where a cache is kept, else all of it again

A next question has as much text as the first one. Answers are left out of both; what a cache keeps
of them costs keys. Tokens of adaptive methods are as many as there may be.
"""

import dataclasses

import jax.numpy as jnp

from llava_mini_jax import config as configs
from llava_mini_jax.cost import network
from llava_mini_jax.cost.flops import forward_flops
from llava_mini_jax.models import cache
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.compressors.fastv import FastVConfig
from llava_mini_jax.models.compressors.llama_vid import INSTRUCT_BLIP, LlamaVidConfig
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.models.compressors.mqt import MqtConfig
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from llava_mini_jax.models.compressors.prumerge_plus import PruMergePlusConfig
from llava_mini_jax.models.compressors.token_packer import TokenPackerConfig
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.models.compressors.voco import VoCoConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

LLAVA_1_5, LLAVA_MINI = "LLaVA-1.5", "LLaVA-Mini"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a model with one image; FLOPs of whole first tokens, bytes in the model's dtype."""

    tokens: int  # of an image, in front of the language model's first layer
    last: int  # of these, those that its last layer's cache keeps; 0 without a cache
    again: int  # of these, those that every further question reads again
    picture_flops: float  # looking at it and compressing it: the part that no question changes
    first_flops: float  # a first question, the image included
    turn_flops: float  # a next question
    cache_bytes: int  # keys and values of the image's tokens in the language model
    fusion_bytes: int  # the same of its patches in pre-fusion


def full_size(vision: ClipConfig, llm: LlamaConfig) -> dict[str, LlavaMiniConfig]:
    """Each method as its authors run it, around these two; LLaVA-1.5 and LLaVA-Mini with one token
    in front.

    ValueError where the tower or the language model lacks what a method reads.
    """
    E, D = vision.width, llm.width
    own: dict[str, CompressorConfig] = {
        "M3": M3Config(count=36),
        "MQT": MqtConfig(width=E, out_width=D, heads=16, queries=256, count=36, norm_eps=1e-6),
        "TokenPacker": TokenPackerConfig(
            width=E, out_width=D, heads=8, levels=(12, 16, 22, 23), scale=2, norm_eps=1e-6
        ),
        "PruMerge": PruMergeConfig(layer=23, neighbours=32, ratio=0.0, variant="clean"),
        "PruMerge+": PruMergePlusConfig(layer=23, neighbours=32, ratio=1 / 8, variant="release"),
        "VisionZip": VisionZipConfig(layer=22, dominant=54, contextual=10),
        "LLaMA-VID": LlamaVidConfig(
            width=E,
            out_width=D,
            content=1,
            class_token=False,
            vision_norm_eps=1e-5,
            **INSTRUCT_BLIP,
        ),
        "VoCo": VoCoConfig(count=2, token_id=None, width=D, between=(13,), variant="clean"),
        "FastV": FastVConfig(layer=2, keep=288, variant="drop"),
        "FastV, no cache": FastVConfig(layer=2, keep=288, variant="mask"),
    }
    none = configs.build(llm, vision, "paper", compressor="none", prefusion_layers=0)
    found = {LLAVA_1_5: none, LLAVA_MINI: configs.build(llm, vision, "release")}
    for name, one in own.items():
        found[name] = configs.build(llm, vision, "paper", compressor=one, prefusion_layers=0)
    return found


def cost(cfg: LlavaMiniConfig, text: int) -> Cost:
    """Of questions with `text` tokens each, one image in front of the first."""
    tokens = cfg.positions_per_image(1)
    picture, first = _forward(cfg, text, text, fused=0), _forward(cfg, text, text)
    fixed = ("vision", "projector", "compressor", "prefusion")
    cached, kept = cfg.keeps_cache, cache.kept(cfg)
    looks_again = not (cached and cfg.declared.reusable)
    reads_again = looks_again or cache.chooses(cfg)
    seen = sum(picture[name] for name in fixed)
    if reads_again:
        turn = sum(_forward(cfg, 2 * text, text).values()) - (0 if looks_again else seen)
    else:
        # The whole conversation's text goes through pre-fusion, but not the image's patches.
        fusion = _forward(cfg, 2 * text, text)["prefusion"] - picture["prefusion"]
        turn = fusion + _read_flops(cfg, text, kept) + first["lm_head"]
    numbers = network.layer(cfg.llm).keys_values(1) * jnp.dtype(cfg.compute_dtype).itemsize
    patches = network.prefused(cfg, 1)[0] if cfg.prefusion_layers else 0
    return Cost(
        tokens=tokens,
        last=kept[-1] if cached else 0,
        again=tokens if reads_again else 0,
        picture_flops=seen,
        first_flops=sum(first.values()),
        turn_flops=turn,
        cache_bytes=sum(kept) * numbers if cached else 0,
        fusion_bytes=cfg.prefusion_layers * patches * numbers,
    )


def _forward(
    cfg: LlavaMiniConfig, text: int, question: int, *, fused: int | None = None
) -> dict[str, float]:
    """FLOPs by component of one image and a text, all of which is fused if not said, and which
    ends in a question of so many ids."""
    shape = network.Shape(
        rows=1,
        images=1,
        parts=1,
        text=text,
        fused=fused,
        sequence=text + cfg.tokens_per_image(1),
        wide=text + cfg.patches_per_image(1) if cfg.inside_layers else 0,
        logits=1,
        question=question,
    )
    return forward_flops(cfg, shape)


def _read_flops(cfg: LlavaMiniConfig, text: int, kept: list[int]) -> float:
    """Of the language model's layers for a next question, behind an image and the first one."""
    layer, weights = network.layer(cfg.llm), network.weights(cfg)
    each = sum(size for path, size in weights.items() if path.startswith("llm/layers/"))
    keys = sum(tokens + 2 * text for tokens in kept)
    scores = 4.0 * text * layer.scores(1, keys) * layer.head_width
    return 2.0 * text * each * cfg.llm.layers + scores
