"""Modality pre-fusion: N LLaMA blocks in which the question's text reads all patches of an image.

    sequence, causal:   [ patches | compressed ]  [ text ]
                          prefuse_image --keys, values--> prefuse_text
                               '--> compressed tokens     '--> fused text

Because attention is causal and the text stands last, what the image's positions compute does not
depend on the text. So the work is split there: `prefuse_image` runs once per image, `prefuse_text`
once per question, and a follow-up question reuses the image's keys and values exactly. In the last
layer the patches give keys and values only, since nobody reads their outputs (19 % of the FLOPs).

Paper section 4.1, equation 3; docs/release.md, "Pre-fusion". Two dialects by what is passed in: the
release puts the compressed tokens into the sequence and reads them after it, the paper does not.

Dimensions: I images, S image positions (patches, then compressed), Q compressed, T text,
D language width, N pre-fusion layers, K key/value heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax.models import llama
from llava_mini_jax.models.llama import Block, LlamaConfig
from llava_mini_jax.ops import masks
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array, stack, unstack


@struct.dataclass
class Prefusion:
    layers: Block | tuple


@struct.dataclass
class ImageMemory:
    """What the text needs of an image: keys and values of its positions in every layer."""

    keys_NISKH: Array
    values_NISKH: Array


def spec(layers: int, cfg: LlamaConfig) -> Prefusion | None:
    """`layers` blocks of the language model's own shape; None without pre-fusion."""
    return Prefusion(layers=stack(layers, llama.block_spec(cfg))) if layers else None


def prefuse_image(
    params: Prefusion, image_ISD: Array, outputs: int, cfg: LlamaConfig, *, remat: str
) -> tuple[Array, ImageMemory]:
    """(outputs of the last `outputs` positions [I, outputs, D], memory) of images without text."""
    images, size = image_ISD.shape[:2]
    positions_IS = jnp.broadcast_to(jnp.arange(size), (images, size))
    turns_ISH = angles(positions_IS, cfg.head_width, cfg.rope)
    valid_IS = jnp.ones_like(image_ISD[..., 0], dtype=bool)
    mask_ISS = masks.causal(jnp.arange(size), valid_IS)

    def keep(k: Array, v: Array):
        return k, v, (k, v)

    def body(layer: Block, x_ISD: Array, _: None):
        return llama.block(layer, x_ISD, turns_ISH, mask_ISS, cfg, keep)

    def read_last(layer: Block, x_ISD: Array, _: None):
        k_ISKH, v_ISKH = llama.keys_values(layer, x_ISD, turns_ISH, cfg)
        tail = slice(size - outputs, size)
        x_IQD = x_ISD[:, tail]
        # The paper's dialect reads no output of the last layer, so no query is left there.
        if outputs:
            x_IQD, _ = llama.block(
                layer,
                x_IQD,
                turns_ISH[:, tail],
                mask_ISS[:, tail],
                cfg,
                lambda k, v: (k_ISKH, v_ISKH, None),
            )
        return x_IQD, (k_ISKH, v_ISKH)

    with jax.named_scope("prefusion_image"):
        earlier, last = _split_last(params.layers)
        x_ISD, memories = image_ISD, []
        if earlier is not None:
            x_ISD, memory = fold_layers(body, earlier, x_ISD, remat=remat)
            memories.append(memory)
        # A stack of one: remat applies to it, and its memory has the layer axis of the others.
        x_IQD, memory = fold_layers(read_last, (last,), x_ISD, remat=remat)
        memories.append(memory)
        keys, values = jax.tree.map(lambda *xs: jnp.concatenate(xs), *memories)
        return x_IQD, ImageMemory(keys_NISKH=keys, values_NISKH=values)


def _split_last(layers: Block | tuple) -> tuple[Block | tuple | None, Block]:
    """(all layers but the last as a stack, or None; the last one)."""
    if isinstance(layers, tuple):
        return layers[:-1] or None, layers[-1]
    last = jax.tree.map(lambda a: a[-1], layers)
    alone = jax.tree.leaves(layers)[0].shape[0] == 1
    return None if alone else jax.tree.map(lambda a: a[:-1], layers), last


def prefuse_text(
    params: Prefusion,
    memory: ImageMemory,
    text_ITD: Array,
    fuse_IT: Array,
    cfg: LlamaConfig,
    *,
    remat: str,
) -> Array:
    """Text after pre-fusion [I, T, D]: each row with its own image.

    Positions where `fuse_IT` is False (image marks, padding, answers) are invisible to the others
    and come back unchanged; position ids run on behind the image's and skip them.
    """
    size = memory.keys_NISKH.shape[2]
    text = text_ITD.shape[1]
    positions_IT = masks.running_positions(fuse_IT, first=size)
    turns_ITH = angles(positions_IT, cfg.head_width, cfg.rope)
    # Ones made from `fuse_IT` lie on the mesh as it does; plain ones could not be joined to it.
    image_IS = jnp.broadcast_to(fuse_IT[:, :1] | True, (fuse_IT.shape[0], size))
    mask_ITS = masks.causal(size + jnp.arange(text), jnp.concatenate([image_IS, fuse_IT], axis=1))

    def body(layer: Block, x_ITD: Array, image: tuple[Array, Array]):
        def remember(k: Array, v: Array):
            # The image in front: the mask counts slots from its first patch.
            return *(
                jnp.concatenate(pair, axis=1) for pair in zip(image, (k, v), strict=True)
            ), None

        return llama.block(layer, x_ITD, turns_ITH, mask_ITS, cfg, remember)

    with jax.named_scope("prefusion_text"):
        stacked = (memory.keys_NISKH, memory.values_NISKH)
        x_ITD, _ = fold_layers(body, params.layers, text_ITD, stacked, remat=remat)
        return jnp.where(fuse_IT[..., None], x_ITD, text_ITD)


def apply_whole(
    params: Prefusion, image_ISD: Array, text_ITD: Array, fuse_IT: Array, cfg: LlamaConfig
) -> tuple[Array, Array, Array]:
    """(outputs of every position, position ids, mask): the same module without the split.

    For comparisons and analyses that want the positions that `prefuse_image` does not compute.
    """
    size = image_ISD.shape[1]
    image_IS = jnp.ones_like(image_ISD[..., 0], dtype=bool)
    valid_IS = jnp.concatenate([image_IS, fuse_IT], axis=1)
    positions_IS = masks.running_positions(valid_IS)
    mask_ISS = masks.causal(np.arange(size + text_ITD.shape[1]), valid_IS)
    x_ISD = jnp.concatenate([image_ISD, text_ITD], axis=1)
    return (
        llama.run_layers(unstack(params.layers), x_ISD, positions_IS, mask_ISS, cfg),
        positions_IS,
        mask_ISS,
    )
