"""Tiny models and inputs that the tests share.

Weights are random but not small: with the usual initialisation every attention is nearly uniform,
and a wrong mask or position would not show.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example, TrainBatch, collate
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig
from llava_mini_jax.training.loss import loss

MARK = -200


@pytest.fixture(autouse=True, scope="module")
def fast_compilation() -> Iterator[None]:
    """Halves the compilation time of a test file, for programs that run a little slower.

    A file that says `fast_compilation = tiny.fast_compilation` has it.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


VISION = ClipConfig(
    image_size=16,
    patch_size=4,
    width=32,
    mlp_width=48,
    layers=3,
    heads=4,
    norm_eps=1e-5,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    select_layer=-2,
    select_feature="patch",
    resample="bicubic",
    mean=configs.CLIP_MEAN,
    std=configs.CLIP_STD,
)

ROPE_SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

LLM = LlamaConfig(
    vocab_size=64,
    width=32,
    mlp_width=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=None),
    max_positions=256,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

BUCKETS = Buckets(lengths=(16, 32), images=(1, 2, 4))


def model(
    dialect: str, llm: LlamaConfig = LLM, vision: ClipConfig = VISION, **changes
) -> LlavaMiniConfig:
    """A tiny LLaVA-Mini: "paper" (C = 2), "release" (C = 1), or "llava-1.5"."""
    if dialect == "llava-1.5":
        changes = {"compressor": "none", "prefusion_layers": 0} | changes
    changes = {"prefusion_layers": 2, "grid": 2 if dialect == "paper" else 1} | changes
    base = "paper" if dialect == "llava-1.5" else dialect
    return configs.build(llm, vision, base, compute_dtype="float32", **changes)


def release_model() -> LlavaMiniConfig:
    """The release's dialect with LLaMA-3.1's rotary scaling."""
    rope = RopeConfig(theta=500.0, scaling=ROPE_SCALING)
    return model("release", dataclasses.replace(LLM, rope=rope))


def loaded(cfg: LlavaMiniConfig, params: LlavaMini, buckets: Buckets) -> Loaded:
    """The model that answering needs, with the digits world's tokenizer."""
    bundle = configs.Bundle(
        model=cfg,
        images=configs.image_config("release", cfg.vision),
        prompt=configs.prompt_config("release", "vicuna_v1", cfg.llm.max_positions),
        eos_ids=(),
        pad_id=0,
    )
    return Loaded(params, bundle, build_tokenizer(), buckets)


@functools.cache
def weights(cfg: LlavaMiniConfig, seed: int = 0) -> LlavaMini:
    """Random parameters as numpy arrays: norm scales about 1, kernels about 1.2 / sqrt(fan-in)."""
    return param_tree.map_paths(functools.partial(_draw, seed), llava_mini.spec(cfg))


def _draw(seed: int, path: str, spec: param_tree.ParamSpec) -> np.ndarray:
    noise = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(spec.shape)
    shape = spec.shape[1:] if spec.axes[:1] == ("layers",) else spec.shape
    name = path.rsplit("/", 1)[-1]
    if name == "scale" or (name.endswith("norm") and len(shape) == 1):
        return (1 + 0.2 * noise).astype(np.float32)
    if name in ("bias", "class_token", "position"):
        return (0.3 * noise).astype(np.float32)
    if name in ("query", "embed_tokens"):
        return noise.astype(np.float32)
    into_heads = len(shape) == 3 and "o_proj" not in path  # [N, H, D]; the way back is [D, N, H]
    fan_in = shape[-1] if into_heads else math.prod(shape[1:])
    return (1.2 * noise / math.sqrt(fan_in)).astype(np.float32)


def example(
    seed: int,
    length: int,
    marks: dict[int, int],
    cfg: LlavaMiniConfig,
    *,
    parts: int = 1,
    answer: int = 0,
) -> Example:
    """A conversation of `length` ids with `marks` {position: frames} and an answer at its end."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, cfg.llm.vocab_size, length).astype(np.int32)
    ids[list(marks)] = MARK
    labels = np.full(length, IGNORE, np.int32)
    labels[length - answer :] = ids[length - answer :]
    frames = tuple(marks[position] for position in sorted(marks))
    side = cfg.vision.image_size
    pixels = rng.standard_normal((sum(frames), parts, side, side, 3)).astype(np.float32)
    most = cfg.declared.question  # ids of what each image is looked at for; 0: nobody reads them
    words = min(most, 3 + seed % 3)
    asked = [rng.integers(0, 11, words).astype(np.int32) for _ in frames if most]
    fuse = (ids >= 0) & (labels == IGNORE)
    return Example(ids, fuse, labels, pixels, frames, questions=tuple(asked))


def batch(
    examples: list[Example],
    cfg: LlavaMiniConfig,
    *,
    buckets: Buckets = BUCKETS,
    padding_side: str = "right",
) -> TrainBatch:
    parts = max((e.pixels.shape[1] for e in examples if len(e.pixels)), default=1)
    sizes = dict(buckets=buckets, padding_side=padding_side, max_length=cfg.llm.max_positions)
    return collate(examples, BatchLayout.of(cfg, parts, **sizes), truncate=False)


@functools.partial(jax.jit, static_argnames="cfg")
def logits(params: LlavaMini, inputs: llava_mini.Inputs, cfg: LlavaMiniConfig) -> jax.Array:
    """Logits [B, S, V] of a whole batch."""
    return llama.logits(params.llm, llava_mini.apply(params, inputs, cfg))


def on_device(tree: param_tree.Tree) -> param_tree.Tree:
    return jax.tree.map(jnp.asarray, tree)


def training_batch(cfg: LlavaMiniConfig) -> TrainBatch:
    """Eight rows of different lengths with answers: images, two images, a video, text alone."""
    kinds = [{2: 1}, {0: 1, 5: 1}, {1: 2}, {}]
    return batch(
        [example(i, 8 + i % 5, kinds[i % 4], cfg, answer=2 + i % 2) for i in range(8)],
        cfg,
        buckets=Buckets(lengths=(16, 64), images=(2,)),
    )


@functools.partial(jax.jit, static_argnames="cfg")
def loss_and_grads(
    params: LlavaMini, batch: TrainBatch, cfg: LlavaMiniConfig
) -> tuple[jax.Array, LlavaMini]:
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, cfg)
    return value, grads
