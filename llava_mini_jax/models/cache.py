"""KV cache: the keys and values of every layer, in slots that all rows fill together.

    slots  0 1 2 3 4 5 6 ...        a prompt padded to 4, then one slot a step
    row 0  a b c d e f              valid 1 1 1 1 1 1 0
    row 1  a b . . e f              valid 1 1 0 0 1 1 0

Rows of different lengths share slots: what is padding in a row stays invalid for ever, and position
ids (which the caller counts per row) do not depend on slots. The keys are stored turned by their
positions.

A layer has arrays of its own, with heads in front of slots: so attention reads them. In one array
for all layers, or with slots in front, every program copied or transposed the whole cache at each
call (1.5 GiB at 12,288 slots of LLaMA-3.1-8B, by XLA's compiler for GPUs).
"""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Array


@struct.dataclass
class Cache:
    keys: tuple[Array, ...]  # of every layer [B, K, S, H]
    values: tuple[Array, ...]
    valid_BS: Array  # which slots hold a token that may be attended to
    used: Array  # int32 scalar: slots filled so far, the same for every row


def empty(layers: int, batch: int, slots: int, heads: int, head_width: int, dtype) -> Cache:
    """A cache of `slots` free slots: 2 * layers * heads * head_width numbers a slot and row."""
    shape = (batch, heads, slots, head_width)
    spec = sharding.partition(shape, ("batch", "heads", None, None))
    row = sharding.partition((batch, slots), ("batch", None))

    def arrays() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(layers))

    return Cache(
        keys=arrays(),
        values=arrays(),
        valid_BS=jnp.zeros((batch, slots), bool, out_sharding=row),
        used=jnp.zeros((), jnp.int32),
    )


def write(earlier_BKSH: Array, new_BKTH: Array, used: Array) -> Array:
    """One layer's keys or values with new ones behind the used slots."""
    # Past the end JAX would shift the update back over used slots: callers make room first.
    return jax.lax.dynamic_update_slice(earlier_BKSH, new_BKTH, (0, 0, used, 0))


def extend_valid(cache: Cache, valid_BT: Array) -> Array:
    """Which slots are valid once T new tokens, valid or padding, are in."""
    return jax.lax.dynamic_update_slice(cache.valid_BS, valid_BT, (0, cache.used))
