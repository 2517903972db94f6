"""A tiny configuration of every method that LLaVA-Mini is compared with."""

import dataclasses
import functools
from typing import Any

from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.model import Model
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.compressors import CompressorConfig, declare
from llava_mini_jax.models.compressors.fastv import FastVConfig
from llava_mini_jax.models.compressors.llama_vid import LlamaVidConfig
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.models.compressors.mqt import MqtConfig
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from llava_mini_jax.models.compressors.prumerge_plus import PruMergePlusConfig
from llava_mini_jax.models.compressors.token_packer import TokenPackerConfig
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.models.compressors.voco import VoCoConfig
from tests import tiny, tiny_model

E, D = tiny.VISION.width, tiny.LLM.width
PRUMERGE = dict(layer=2, neighbours=5, ratio=0.0, variant="clean")
METHODS: dict[str, CompressorConfig] = {
    "m3": M3Config(count=4),
    "mqt": MqtConfig(width=E, out_width=D, heads=4, queries=9, count=5, norm_eps=1e-6),
    "token_packer": TokenPackerConfig(
        width=E, out_width=D, heads=4, levels=(0, 2, 1), scale=2, norm_eps=1e-6
    ),
    "prumerge": PruMergeConfig(**PRUMERGE),
    "prumerge, a quarter": PruMergeConfig(**PRUMERGE | dict(ratio=0.25, variant="release")),
    "prumerge_plus": PruMergePlusConfig(**PRUMERGE),
    "prumerge_plus, a quarter": PruMergePlusConfig(**PRUMERGE | dict(ratio=0.25)),
    "visionzip": VisionZipConfig(layer=1, dominant=4, contextual=3),
    "llama_vid": LlamaVidConfig(
        width=E,
        out_width=D,
        content=2,
        class_token=True,
        vision_norm_eps=1e-5,
        qformer_width=24,
        qformer_heads=2,
        qformer_layers=2,
        qformer_mlp_width=32,
        qformer_cross_every=2,
        qformer_cross_width=28,
        qformer_queries=3,
        qformer_vocabulary=11,
        qformer_positions=8,
        qformer_norm_eps=1e-12,
    ),
    "voco": VoCoConfig(count=2, token_id=None, width=D, between=(3,), variant="clean"),
    "voco, a token of the LLM's": VoCoConfig(
        count=1, token_id=5, width=D, between=(), variant="release"
    ),
    "nested": NestedConfig(way="grids", width=D, counts=(1, 4, 9), count=4),
    "fastv": FastVConfig(layer=1, keep=5, variant="mask"),
}


@functools.cache
def model(name: str, **changes: Any) -> Model:
    """A model to ask that has a method; `changes` are of its compressor."""
    own = "none" if name == "none" else dataclasses.replace(METHODS[name], **changes)
    declared, bundle = METHODS.get(name) and declare(METHODS[name]), tiny_model.bundle("paper")
    llm = dataclasses.replace(bundle.model.llm, layers=2)
    alone = declared is None or declared.inside or declared.places == ("instead",)
    cfg = tiny.model(
        "paper",
        llm,
        tiny.VISION,
        compressor=own,
        prefusion_layers=0 if alone else 1,
    )
    bundle = dataclasses.replace(bundle, model=cfg)
    params = llava_mini.unrolled(tiny_model.weights(bundle))
    return Model(params, bundle, build_tokenizer(), bounds.buckets_for(bundle))
