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

Dimensions: I images, S image positions (patches, then compressed), Q compressed, T text, F those
positions of it that take part, D language width, N pre-fusion layers, K key/value heads,
H head width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models import decoder, llama
from llava_mini_jax.models.decoder import Block, Layer, LlamaConfig
from llava_mini_jax.ops import masks
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array, stack, unstack


@struct.dataclass
class Prefusion:
    layers: Block | tuple


@struct.dataclass
class ImageMemory:
    """What the text needs of an image: keys and values of its positions in every layer."""

    keys_NIKSH: Array
    values_NIKSH: Array


def spec(layers: int, cfg: LlamaConfig) -> Prefusion | None:
    """`layers` blocks of the language model's own shape; None without pre-fusion."""
    return Prefusion(layers=stack(layers, decoder.block_spec(cfg))) if layers else None


def prefuse_image(
    params: Prefusion,
    image_ISD: Array,
    outputs: int,
    cfg: LlamaConfig,
    *,
    remat: str,
    attention: str = "auto",
) -> tuple[Array, ImageMemory]:
    """(outputs of the last `outputs` positions [I, outputs, D], memory) of images without text."""
    images, size = image_ISD.shape[:2]
    positions_IS = jnp.broadcast_to(jnp.arange(size), (images, size))
    angles_ISH = angles(positions_IS, cfg.head_width, cfg.rope)
    attends = attend(Mask(first=0, window=cfg.window), attention)

    def keep(k: Array, v: Array):
        return k, v, (k, v)

    def body(layer: Layer, x_ISD: Array, _: None):
        return decoder.block(layer, x_ISD, angles_ISH, attends, cfg, keep)

    def read_last(layer: Layer, x_ISD: Array, _: None):
        k_IKSH, v_IKSH = decoder.keys_values(layer, x_ISD, angles_ISH, cfg)
        tail = slice(size - outputs, size)
        x_IQD = x_ISD[:, tail]
        # The paper's dialect reads no output of the last layer, so no query is left there.
        if outputs:
            x_IQD, _ = decoder.block(
                layer,
                x_IQD,
                angles_ISH[:, tail],
                attend(Mask(first=size - outputs, window=cfg.window), attention),
                cfg,
                lambda k, v: (k_IKSH, v_IKSH, None),
            )
        return x_IQD, (k_IKSH, v_IKSH)

    with jax.named_scope("prefusion_image"):
        earlier, last = _split_last(decoder.each(params.layers, cfg, whole=False))
        x_ISD, memories = image_ISD, []
        if earlier is not None:
            x_ISD, memory = fold_layers(body, earlier, x_ISD, remat=remat)
            memories.append(memory)
        # A stack of one: remat applies to it, and its memory has the layer axis of the others.
        x_IQD, memory = fold_layers(read_last, (last,), x_ISD, remat=remat)
        memories.append(memory)
        keys, values = jax.tree.map(lambda *xs: jnp.concatenate(xs), *memories)
        return x_IQD, ImageMemory(keys_NIKSH=keys, values_NIKSH=values)


def _split_last(layers: Layer | tuple) -> tuple[Layer | tuple | None, Layer]:
    """(all layers but the last as a stack, or None; the last one)."""
    if isinstance(layers, tuple):
        return layers[:-1] or None, layers[-1]
    last = jax.tree.map(lambda a: a[-1], layers)
    alone = jax.tree.leaves(layers)[0].shape[0] == 1
    return None if alone else jax.tree.map(lambda a: a[:-1], layers), last


def prefuse_text(
    params: Prefusion,
    memory: ImageMemory,
    text_IFD: Array,
    cfg: LlamaConfig,
    *,
    remat: str,
    attention: str = "auto",
) -> Array:
    """Text after pre-fusion [I, F, D]: each row with its own image.

    Of the text only what takes part (no image marks, no answers), one position after the other;
    what pads a row stands behind it, is seen by nothing, and gives nothing that may be read.
    """
    size = memory.keys_NIKSH.shape[3]
    # Position ids run on behind the image's.
    positions_IF = jnp.broadcast_to(size + jnp.arange(text_IFD.shape[1]), text_IFD.shape[:2])
    angles_IFH = angles(positions_IF, cfg.head_width, cfg.rope)
    attends = attend(Mask(first=size, window=cfg.window), attention)
    layers = decoder.each(params.layers, cfg, whole=False)

    def body(layer: Layer, x_IFD: Array, image: tuple[Array, Array]):
        def remember(k: Array, v: Array):
            # The image in front: the mask counts slots from its first patch.
            return *(
                jnp.concatenate(pair, axis=2) for pair in zip(image, (k, v), strict=True)
            ), None

        return decoder.block(layer, x_IFD, angles_IFH, attends, cfg, remember)

    with jax.named_scope("prefusion_text"):
        stacked = (memory.keys_NIKSH, memory.values_NIKSH)
        return fold_layers(body, layers, text_IFD, stacked, remat=remat)[0]


def take_fused(text_BTD: Array, fuse_BF: Array) -> Array:
    """The text [B, F, D] that takes part in pre-fusion: from places `fuse_BF`, -1 where padded."""
    fuse_BF = sharding.constrain(fuse_BF, ("batch", None))
    return jnp.take_along_axis(text_BTD, jnp.maximum(fuse_BF, 0)[..., None], axis=1)


def put_fused(text_BTD: Array, fused_BFD: Array, fuse_BF: Array) -> Array:
    """The text with what `take_fused` took in its place again, fused."""

    def put(text_TD: Array, fused_FD: Array, fuse_F: Array) -> Array:
        # Padding goes out of range, where the scatter drops it: -1 would be the last position.
        places_F = jnp.where(fuse_F >= 0, fuse_F, len(text_TD))
        return text_TD.at[places_F].set(fused_FD, mode="drop")

    # Row by row: all three have to lie alike.
    text_BTD, fused_BFD = (
        sharding.constrain(x, ("batch", None, None)) for x in (text_BTD, fused_BFD)
    )
    fuse_BF = sharding.constrain(fuse_BF, ("batch", None))
    return jax.vmap(put)(text_BTD, fused_BFD.astype(text_BTD.dtype), fuse_BF)


def apply_whole(
    params: Prefusion, image_ISD: Array, text_ITD: Array, fuse_IT: Array, cfg: LlamaConfig
) -> tuple[Array, Array, Array]:
    """(outputs of every position, position ids, mask): the same module without the split.

    For comparisons and analyses that want the positions that `prefuse_image` does not compute, and
    text that does not take part (`fuse_IT` False) in its place.
    """
    image_IS = jnp.ones_like(image_ISD[..., 0], dtype=bool)
    valid_IS = jnp.concatenate([image_IS, fuse_IT], axis=1)
    positions_IS = masks.running_positions(valid_IS)
    mask = Mask(first=0, valid_BS=valid_IS, window=cfg.window)
    x_ISD = jnp.concatenate([image_ISD, text_ITD], axis=1)
    layers = decoder.each(unstack(params.layers), cfg, whole=False)
    outputs_ISD = llama.run_layers(layers, x_ISD, positions_IS, attend(mask, "xla"), cfg)
    return outputs_ISD, positions_IS, masks.causal(valid_IS, cfg.window)
