"""The compiled parts of seeing (seeing.py): a chunk of frames, and text that is fused with them.

    ids --embed_text--> text, and what of it is fused
    pixels --encode_vision--> features --prefuse_images--> visual tokens, pre-fusion's keys, values
    keys, values, text --prefuse_text, or prefuse_texts of several requests--> sums of fused text
    sums --mean_text--> the text as the language model reads it

Each compiles once for a size of chunk and text.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.models import compressors, llava_mini
from llava_mini_jax.models.compressors import Compressed
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.prefusion import ImageMemory, take_fused
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.texts import put_mean
from llava_mini_jax.params import Array


@partial(jax.jit, static_argnames="cfg")
def embed_text(
    params: LlavaMini, ids_BT: Array, fuse_BF: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(embeddings [B, T, D], those of them that take part in pre-fusion [B, F, D])."""
    text_BTD = llava_mini.embed_text(params, ids_BT, cfg)
    return text_BTD, take_fused(text_BTD, fuse_BF)


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
) -> tuple[Compressed, ImageMemory | None]:
    """(visual tokens [I, Q, D] and which are there, what pre-fusion keeps of the patches) of a
    chunk."""
    patches_ISD, visual = llava_mini.project_and_compress(params, seen, cfg)
    if cfg.declared.inside:
        parts, own = seen.patches_IPE.shape[1], cfg.compressor
        patches = cfg.patches_per_image(parts)
        tokens_IQD = compressors.with_tokens(
            params.compressor, params.llm, visual.tokens_IQE, patches, own
        )
        visual = dataclasses.replace(visual, tokens_IQE=tokens_IQD)
    if params.prefusion is None:
        return jax.tree.map(_everywhere, visual), None
    tokens_IQD, memory = llava_mini.prefuse_images(params, patches_ISD, visual.tokens_IQE, cfg)
    axes = (None, None, "heads", None, None)
    memory = jax.tree.map(lambda x: sharding.constrain(x, axes), memory)
    visual = dataclasses.replace(visual, tokens_IQE=tokens_IQD)
    return jax.tree.map(_everywhere, visual), memory


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
    return put_mean(total_FD[None], frames[None], text_BTD, fuse_BF)
