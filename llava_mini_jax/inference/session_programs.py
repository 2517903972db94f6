"""The compiled parts of a session (session.py): a chunk of frames, a block of the prompt.

    pixels --encode_vision--> features --prefuse_images--> visual tokens, pre-fusion's keys, values
    keys, values, text --prefuse_text--> sums of fused text
    fused text, visual tokens --prefill_block--> KV cache, logits

Each compiles once for a size of chunk, text or block.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import power_of_two
from llava_mini_jax.models import cache as kv
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.prefusion import ImageMemory
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.splice import splice
from llava_mini_jax.params import Array

LENGTH = 512  # positions of a prompt that are computed together, at most
SCORES = 2**21  # of a head: those positions times the slots of the KV cache, at most


def length(slots: int) -> int:
    """Positions of a prompt that are computed together, a power of two.

    Fewer against a long cache: their scores against all of its slots are what a block's memory is.
    """
    # 1 << n.bit_length() - 1: the largest power of two up to n.
    return min(LENGTH, 1 << max(16, SCORES // slots).bit_length() - 1)


def slots(needed: int) -> int:
    """Slots of a KV cache for so many positions: one of few sizes, at most an eighth too many."""
    step = max(LENGTH, power_of_two(needed) // 8)
    return -(-needed // step) * step


def sizes(prompt: int, room: int) -> tuple[int, list[int]]:
    """(slots of the KV cache, sizes of the blocks) for a prompt that is read from its beginning."""
    # LENGTH more, because the last block writes its padding behind the prompt.
    needed = slots(prompt + LENGTH + room)
    most = length(needed)
    return needed, [block(min(most, prompt - start)) for start in range(0, prompt, most)]


def block(positions: int) -> int:
    """The size of the block that holds so many positions of a prompt."""
    return max(16, power_of_two(positions))


@partial(jax.jit, static_argnames="cfg")
def encode_vision(params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig) -> Seen:
    """What the tower hands over of a chunk, [I, J, ...]."""
    return jax.tree.map(_everywhere, llava_mini.encode_vision(params, pixels_IJYXC, cfg))


def _everywhere(x: Array) -> Array:
    """Chunks are cut and put together, which no mesh axis along their images lets one do."""
    return sharding.constrain(x, (None,) * x.ndim)


@partial(jax.jit, static_argnames="cfg")
def prefuse_images(
    params: LlavaMini, seen: Seen, cfg: LlavaMiniConfig
) -> tuple[Array, ImageMemory | None]:
    """(visual tokens [I, Q, D], what pre-fusion keeps of the patches) of a chunk."""
    patches_ISD, compressed = llava_mini.project_and_compress(params, seen, cfg)
    if compressed.valid_IQ is not None:
        raise ValueError("tokens of pictures that have different numbers of them cannot be kept")
    compressed_IQD = compressed.tokens_IQE
    if params.prefusion is None:
        return _everywhere(compressed_IQD), None
    tokens_IQD, memory = llava_mini.prefuse_images(params, patches_ISD, compressed_IQD, cfg)
    axes = (None, None, "heads", None, None)
    memory = jax.tree.map(lambda x: sharding.constrain(x, axes), memory)
    return _everywhere(tokens_IQD), memory


@partial(jax.jit, static_argnames="cfg", donate_argnames="total_FD")
def prefuse_text(
    params: LlavaMini,
    total_FD: Array,
    memory: ImageMemory,
    frames: Array,
    text_BFD: Array,
    cfg: LlavaMiniConfig,
) -> Array:
    """The float32 sum of fused text with the first `frames` frames of a chunk added."""
    I = memory.keys_NIKSH.shape[1]
    text_IFD = jnp.broadcast_to(text_BFD, (I, *text_BFD.shape[1:]))
    fused_IFD = _prefused(params, memory, text_IFD, cfg)
    # One after the other: then the sum does not depend on how a video is cut into chunks.
    for frame in range(I):
        fused_FD = fused_IFD[frame].astype(jnp.float32)
        total_FD += jnp.where(frame < frames, fused_FD, 0.0)
    return total_FD


@partial(jax.jit, static_argnames="cfg")
def prefuse_texts(
    params: LlavaMini, memory: ImageMemory, texts: tuple[Array, ...], cfg: LlavaMiniConfig
) -> tuple[Array, ...]:
    """Fused texts, float32 [F, D] each, of I texts [1, F, D] with an image of a chunk for each."""
    fused_IFD = _prefused(params, memory, jnp.concatenate(texts), cfg)
    return tuple(fused_IFD.astype(jnp.float32))


def _prefused(
    params: LlavaMini, memory: ImageMemory, text_IFD: Array, cfg: LlavaMiniConfig
) -> Array:
    axes = (None, "batch", "heads", None, None)
    memory = jax.tree.map(lambda x: sharding.constrain(x, axes), memory)
    text_IFD = sharding.constrain(text_IFD, ("batch", None, None))
    return _everywhere(llava_mini.prefuse_text(params, memory, text_IFD, cfg))


@jax.jit
def join(memories: tuple[ImageMemory, ...]) -> ImageMemory:
    """One chunk of several."""
    return jax.tree.map(lambda *chunks: jnp.concatenate(chunks, axis=1), *memories)


@partial(jax.jit, static_argnames="axis")
def one_of(chunk: Any, number: Array, axis: int) -> Any:
    """One image of a chunk, as a chunk of its own."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, axis), chunk)


@partial(jax.jit, donate_argnames="total_FD")
def add(total_FD: Array, more_FD: Array) -> Array:
    return total_FD + more_FD


@jax.jit
def mean_text(total_FD: Array, frames: Array, text_BTD: Array, fuse_BF: Array) -> Array:
    """The text [1, T, D] with its fused part's mean over the frames in its place."""
    return llava_mini.put_mean(total_FD[None], frames[None], text_BTD, fuse_BF)


@jax.jit
def splice_block(text_BTD: Array, visual_SD: Array, slots_S: Array) -> Array:
    """What stands at the places of a block [S, D]; `slots_S` are splice.py's."""
    return splice(text_BTD, visual_SD[None], slots_S[None])[0]


# Donated: the cache is filled in place, block by block.
@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def prefill_block(
    params: LlavaMini,
    cache: kv.Cache,
    text_BTD: Array,
    visual_BSD: Array,
    slots_BS: Array,
    first: Array,
    count: Array,
    cfg: LlavaMiniConfig,
) -> tuple[Array, kv.Cache]:
    """(logits [1, V] behind the block, cache) of `count` positions from position `first` on.

    What is padding behind them in the block is written to the cache too, and written over by
    whatever comes next. `slots_BS` are splice.py's, of the text and of this block's `visual_BSD`.
    """
    x_BSD = splice(text_BTD, visual_BSD, slots_BS)
    positions_BS = first + jnp.arange(slots_BS.shape[1])[None]
    before = cache.used
    x_BSD, cache = llama.apply_cached(
        params.llm, x_BSD, positions_BS, slots_BS >= 0, cache, cfg.llm, attention=cfg.attention
    )
    last_B1D = jax.lax.dynamic_slice_in_dim(x_BSD, count - 1, 1, axis=1)
    cache = dataclasses.replace(cache, used=before + count)
    return llama.logits(params.llm, last_B1D)[:, 0], cache


def with_room(cache: kv.Cache | None, slots: int, keep: int, cfg: LlavaMiniConfig) -> kv.Cache:
    """A cache of at least `slots` slots that begins with the first `keep` of the given one."""
    if cache is None or cache.valid_BS.shape[1] < slots:
        grown = kv.empty(cfg.llm.layers, 1, slots, cfg.llm.kv_heads, cfg.llm.head_width, cfg.dtype)
        cache = grown if cache is None else _copied(grown, cache)
    return _rewound(cache, jnp.int32(keep))


@partial(jax.jit, donate_argnums=0)
def _copied(grown: kv.Cache, cache: kv.Cache) -> kv.Cache:
    return jax.tree.map(
        lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), grown, cache
    )


@partial(jax.jit, donate_argnums=0)
def _rewound(cache: kv.Cache, keep: Array) -> kv.Cache:
    # Keys behind `keep` stay where they are, invalid, until they are written over.
    valid_BS = cache.valid_BS & (jnp.arange(cache.valid_BS.shape[1]) < keep)
    return dataclasses.replace(cache, valid_BS=valid_BS, used=keep)
