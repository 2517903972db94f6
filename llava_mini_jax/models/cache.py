"""KV cache: the keys and values of every layer, in slots that all rows fill together.

    slots  0 1 2 3 4 5 6 ...        a prompt padded to 4, then one slot a step
    row 0  a b c d e f              valid 1 1 1 1 1 1 0
    row 1  a b . . e f              valid 1 1 0 0 1 1 0

Rows of different lengths share slots: what is padding in a row stays invalid for ever, and position
ids (which the caller counts per row) do not depend on slots. The keys are stored turned by their
positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Array


@struct.dataclass
class Cache:
    keys_LBSKH: Array  # one array for all layers: the loop over them updates it in place
    values_LBSKH: Array
    valid_BS: Array  # which slots hold a token that may be attended to
    used: Array  # int32 scalar: slots filled so far, the same for every row


def empty(layers: int, batch: int, slots: int, heads: int, head_width: int, dtype) -> Cache:
    """A cache of `slots` free slots: 2 * layers * heads * head_width numbers a slot and row."""
    shape = (layers, batch, slots, heads, head_width)
    spec = sharding.partition(shape, ("layers", "batch", None, "heads", None))
    row = sharding.partition((batch, slots), ("batch", None))
    return Cache(
        keys_LBSKH=jnp.zeros(shape, dtype, out_sharding=spec),
        values_LBSKH=jnp.zeros(shape, dtype, out_sharding=spec),
        valid_BS=jnp.zeros((batch, slots), bool, out_sharding=row),
        used=jnp.zeros((), jnp.int32),
    )


def write(cache: Cache, layer: int | Array, k_BTKH: Array, v_BTKH: Array) -> Cache:
    """The cache with one layer's new keys and values behind the used slots."""
    # Past the end JAX would shift the update back over used slots: callers make room first.
    at = (layer, 0, cache.used, 0, 0)
    return dataclasses.replace(
        cache,
        keys_LBSKH=jax.lax.dynamic_update_slice(cache.keys_LBSKH, k_BTKH[None], at),
        values_LBSKH=jax.lax.dynamic_update_slice(cache.values_LBSKH, v_BTKH[None], at),
    )


def read(cache: Cache, layer: int | Array) -> tuple[Array, Array]:
    """One layer's keys and values, all slots."""
    return (
        jax.lax.dynamic_index_in_dim(cache.keys_LBSKH, layer, keepdims=False),
        jax.lax.dynamic_index_in_dim(cache.values_LBSKH, layer, keepdims=False),
    )


def extend_valid(cache: Cache, valid_BT: Array) -> Array:
    """Which slots are valid once T new tokens, valid or padding, are in."""
    return jax.lax.dynamic_update_slice(cache.valid_BS, valid_BT, (0, cache.used))
