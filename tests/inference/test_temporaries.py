"""No program of generation holds the weights a second time, whatever dtype they have.

    abstract weights, one row --lower, compile--> XLA's plan: temporary bytes beside the arguments

A loop over tokens used to turn every int8 and bfloat16 weight into float32 in front of itself, and
three-index weights were transposed as a whole: 60 to 100 % of the float weights.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.config import ASKING_DTYPES as DTYPES
from llava_mini_jax.config import CLIP_L_336, LLAMA_3_1_8B, NARROW_DTYPES
from llava_mini_jax.inference import reading, seeing_programs, slots
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.weights import quantize

MOST = 0.1  # of the weights in float32
TEXT, SLOTS, ROOM = 60, 1024, 16

# SmolLM2-135M's language model behind a tower as wide as CLIP-L.
SMOLLM2 = dataclasses.replace(
    LLAMA_3_1_8B,
    vocab_size=49_152,
    width=576,
    mlp_width=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    max_positions=8192,
    tied_head=True,
)
# The same with fewer layers and words, which compiles in a second.
SMALL = dataclasses.replace(SMOLLM2, layers=4, vocab_size=16_384)
SIZES = {
    "small": (SMALL, dataclasses.replace(CLIP_L_336, image_size=84, layers=4)),
    "135M": (SMOLLM2, dataclasses.replace(CLIP_L_336, layers=12)),
}
PROGRAMS = (
    "embed_text",
    "look",
    "read",
    "fuse",
    "fuse two",
    "begin",
    "a word",
    "a block",
    "decode",
)
QUICK = ("float32", "int4")  # each dtype compiles for many seconds


def config(size: str, dtype: str) -> LlavaMiniConfig:
    computing = "float32" if dtype in NARROW_DTYPES else dtype
    return configs.build(*SIZES[size], "release", prefusion_layers=2, compute_dtype=computing)


def abstract(cfg: LlavaMiniConfig, dtype: str) -> Any:
    """The parameters as `load` leaves them, as shapes."""

    narrow = dtype if dtype in NARROW_DTYPES else None

    def leaf(path: str, spec: param_tree.ParamSpec) -> Any:
        return quantize.abstract(path, spec, spec.output_axes, narrow, cfg.dtype)

    return param_tree.map_paths(leaf, llava_mini.unrolled(llava_mini.spec(cfg)))


def lowered(cfg: LlavaMiniConfig, params: Any) -> Iterator[tuple[str, Any]]:
    """Every large program of the engine, for one slot and one image."""
    D = cfg.llm.width

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    side, one, number = cfg.vision.image_size, array(1), array()
    pixels = array(1, 1, side, side, 3, dtype=jnp.uint8)
    text, fuse = array(1, TEXT, D, dtype=cfg.dtype), array(1, TEXT)
    yield "embed_text", seeing_programs.embed_text.lower(params, array(1, TEXT), fuse, cfg)
    yield "look", seeing_programs.encode_vision.lower(params, pixels, cfg)
    features = jax.eval_shape(lambda p, x: seeing_programs.encode_vision(p, x, cfg), params, pixels)
    yield "read", seeing_programs.prefuse_images.lower(params, features, cfg)
    _, memory = jax.eval_shape(
        lambda p, x: seeing_programs.prefuse_images(p, x, cfg), params, features
    )
    total = array(TEXT, D, dtype=jnp.float32)
    fusing = (params, total, memory, number, text, cfg)
    yield "fuse", seeing_programs.prefuse_text.lower(*fusing)
    both = jax.eval_shape(lambda memory: seeing_programs.join((memory, memory)), memory)
    yield "fuse two", seeing_programs.prefuse_texts.lower(params, both, (text, text), cfg)
    lane = jax.eval_shape(lambda: slots.empty(1, SLOTS, cfg))
    sampling, flags = make_sampling(1, 0.0, 1.0, 0, 0, ()), array(1, dtype=bool)

    def block(size: int) -> Any:
        return array(size, D, dtype=cfg.dtype)

    begin = (params, lane, (block(128),), one, one, flags, sampling, flags, cfg)
    yield "begin", reading.read_fresh.lower(*begin)
    for name, size in (("a word", 32), ("a block", 128)):
        numbers = (number, number, number, array(dtype=bool))
        more = (params, lane, block(size), *numbers, sampling, flags, cfg)
        yield name, reading.read_block.lower(*more)
    yield (
        "decode",
        slots.decode.lower(params, lane, sampling, flags, flags, number, number, cfg, 64),
    )


@pytest.mark.parametrize(
    "dtype", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DTYPES]
)
@pytest.mark.parametrize("size", ["small", pytest.param("135M", marks=pytest.mark.slow)])
def test_temporary_memory_is_a_tenth_of_the_float_weights(size: str, dtype: str) -> None:
    cfg = config(size, dtype)
    weights = 4 * param_tree.count(llava_mini.spec(cfg))
    found = {}
    for name, program in lowered(cfg, abstract(cfg, dtype)):
        found[name] = program.compile().memory_analysis().temp_size_in_bytes / weights
    assert list(found) == list(PROGRAMS)
    assert {name: share for name, share in found.items() if share > MOST} == {}
