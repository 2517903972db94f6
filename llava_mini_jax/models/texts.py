"""Which text each image or frame of a row is fused with, and where what comes of it goes.

    OneText       a row is one conversation: all its frames read the same text
    PackedTexts   a row is several, one behind the other: an image reads that of its own

    text_BTD --read--> text_BIFD --pre-fusion--> fused_BIFD --add--> float32 sums --put--> text_BTD

Both pool over the frames of a conversation (paper section 4.2: a video's; several images do the
same), in float32 as the release does: a long sum in bfloat16 swallows single frames.

`each` is what they know of every frame, [B, I, ...]; of a long video it is handed over in pieces,
along the second axis. Dimensions as in models/llava_mini.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models.prefusion import put_fused, take_fused
from llava_mini_jax.params import Array, Leaf


@struct.dataclass
class Packed:
    """Several conversations in a row, as the host plans them (data/batches/packed.py)."""

    segments_BS: Leaf  # int32: the conversation of each position, from 0 on; -1: padding
    fuse_BIF: Leaf  # int32: places of the text that each image is fused with; -1: padding
    shares_BI: Leaf  # float32: 1 / images of an image's conversation; 0: padding


@struct.dataclass
class OneText:
    text_BTD: Array
    text_BFD: Array  # what takes part of it,
    fuse_BF: Array  # and its places
    frames_BI: Array  # bool: a real image or frame

    @classmethod
    def of(cls, text_BTD: Array, fuse_BF: Array, frames_BI: Array) -> "OneText":
        return cls(text_BTD, take_fused(text_BTD, fuse_BF), fuse_BF, frames_BI)

    @property
    def each(self) -> Any:
        return self.frames_BI

    def read(self, frames_BI: Array) -> Array:
        # `jnp.repeat` wants to be told its sharding on a mesh; this keeps the rows'.
        B, F, D = self.text_BFD.shape
        return jnp.broadcast_to(self.text_BFD[:, None], (B, frames_BI.shape[1], F, D))

    def add(self, fused_BIFD: Array, frames_BI: Array) -> Array:
        """Sums over these frames [B, F, D]."""
        real_BI11 = frames_BI[:, :, None, None]
        return jnp.where(real_BI11, fused_BIFD.astype(jnp.float32), 0.0).sum(axis=1)

    def nothing(self) -> Array:
        return jnp.zeros_like(self.text_BFD, jnp.float32)

    def put(self, total_BFD: Array) -> Array:
        return put_mean(total_BFD, self.frames_BI.sum(axis=1), self.text_BTD, self.fuse_BF)


@struct.dataclass
class PackedTexts:
    text_BTD: Array
    packed: Packed

    @property
    def each(self) -> Any:
        return self.packed.fuse_BIF, self.packed.shares_BI

    def read(self, some: Any) -> Array:
        fuse_BIF, _ = some
        B, I, F = fuse_BIF.shape
        return take_fused(self.text_BTD, fuse_BIF.reshape(B, I * F)).reshape(B, I, F, -1)

    def add(self, fused_BIFD: Array, some: Any) -> Array:
        """Sums over these images in their places [B, T, D], each image's share of its mean."""
        fuse_BIF, shares_BI = some
        shared_BIFD = fused_BIFD.astype(jnp.float32) * shares_BI[:, :, None, None]
        return _scattered(shared_BIFD, fuse_BIF, self.text_BTD.shape[1])

    def nothing(self) -> Array:
        return jnp.zeros_like(self.text_BTD, jnp.float32)

    def put(self, total_BTD: Array) -> Array:
        # Padding's images have no places, so what has one is fused.
        fuse_BIF = self.packed.fuse_BIF
        ones_BIF1 = jnp.ones((*fuse_BIF.shape, 1), jnp.float32)
        fused_BT1 = _scattered(ones_BIF1, fuse_BIF, total_BTD.shape[1]) > 0
        return jnp.where(fused_BT1, total_BTD.astype(self.text_BTD.dtype), self.text_BTD)


def _scattered(values_BIFD: Array, places_BIF: Array, text: int) -> Array:
    """[B, text, D]: the sum of what goes to each place of the text."""

    def one(values_ND: Array, places_N: Array) -> Array:
        # Padding goes out of range, where the scatter drops it: -1 would be the last position.
        places_N = jnp.where(places_N >= 0, places_N, text)
        zeros_TD = jnp.zeros((text, values_ND.shape[-1]), values_ND.dtype)
        return zeros_TD.at[places_N].add(values_ND, mode="drop")

    B, I, F, D = values_BIFD.shape
    # Row by row: both have to lie alike.
    values_BND = sharding.constrain(values_BIFD.reshape(B, I * F, D), ("batch", None, None))
    places_BN = sharding.constrain(places_BIF.reshape(B, I * F), ("batch", None))
    return jax.vmap(one)(values_BND, places_BN)


def put_mean(total_BFD: Array, count_B: Array, text_BTD: Array, fuse_BF: Array) -> Array:
    """The text with sums of its fused part over `count_B` images put in its place, as their mean.

    Where there is no image the text stays as it is.
    """
    # Not 0 / 0, whose gradient is NaN even where `where` takes the other branch.
    mean_BFD = total_BFD / jnp.maximum(count_B, 1)[:, None, None]
    fused_BTD = put_fused(text_BTD, mean_BFD, fuse_BF)
    return jnp.where((count_B > 0)[:, None, None], fused_BTD, text_BTD)
