"""A complete model folder with tiny random weights, for tests that go through files."""

import functools
import tempfile
from pathlib import Path

import jax

from llava_mini_jax import config as C
from llava_mini_jax import params as P
from llava_mini_jax.data.digits import build_tokenizer
from llava_mini_jax.data.images import ImageConfig
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.ops.rope import RopeConfig
from llava_mini_jax.weights.export_hf import export_model

VISION = ClipConfig(
    image_size=28,
    patch_size=7,
    width=32,
    mlp_width=64,
    layers=3,
    heads=2,
    norm_eps=1e-5,
    activation="quick_gelu",
    select_layer=-2,
    select_feature="patch",
    mean=C.CLIP_MEAN,
    std=C.CLIP_STD,
)


def llm(positions: int = 256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(build_tokenizer()),
        width=48,
        mlp_width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=12,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0, scaling=None),
        max_positions=positions,
        tied_head=False,
        # Not small: with 0.02 every prompt would get nearly the same answer.
        init_stddev=0.5,
    )


def bundle(dialect: str, *, compressed: bool = True, positions: int = 256) -> C.Bundle:
    model = C.build(
        llm(positions),
        VISION,
        dialect,
        compressor=None if compressed else "none",
        grid=1,
        prefusion_layers=2 if compressed else 0,
        compute_dtype="float32",
    )
    return C.Bundle(
        model=model,
        images=ImageConfig(
            size=VISION.image_size,
            aspect="pad",
            grid=1,
            split="pad_then_split" if dialect == "paper" else "split_then_pad",
            repeat_whole=False,
            mean=VISION.mean,
            std=VISION.std,
        ),
        prompt=C.prompt_config(dialect, "vicuna_v1", positions),
        eos_ids=(build_tokenizer().eos_token_id,),
        pad_id=build_tokenizer().pad_token_id,
    )


@functools.cache
def folder(dialect: str = "paper", *, compressed: bool = True, positions: int = 256) -> Path:
    """The folder of a model, written once in a test run; tests that change one copy it first."""
    path = Path(_home().name) / f"{dialect}-{compressed}-{positions}"
    config = bundle(dialect, compressed=compressed, positions=positions)
    params = P.init(jax.random.key(1), llava_mini.spec(config.model))
    export_model(params, config, path, tokenizer=build_tokenizer())
    return path


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-model-")
