"""Boolean attention masks [B, T, S], query by key positions: True = may attend."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from llava_mini_jax.params import Array


def causal(query_slots_T: ArrayLike, valid_BS: Array) -> Array:
    """Each query sees the valid keys in its own slot and before it.

    One rule serves a whole sequence, a block of a long prefill, one decoding step and pre-fusion:
    slots are places in the key sequence, so padding inside it only has to be marked invalid.

        causal([2, 3], [[1, 1, 0, 1, 1]]) =
            query in slot 2:  1 1 0 0 0
            query in slot 3:  1 1 0 1 0
    """
    slots_S = jnp.arange(valid_BS.shape[1])
    return (slots_S[None, None, :] <= jnp.asarray(query_slots_T)[None, :, None]) & valid_BS[
        :, None, :
    ]


def running_positions(valid_BT: Array, first: int | Array = 0) -> Array:
    """Position ids that count valid entries only, from `first`; invalid entries get 1.

    The 1 has no effect (an invalid entry is seen by none); it is what the release computes
    (docs/release.md, "Masks"), so that every intermediate array can be compared with it.

        running_positions([[1, 0, 1, 1]], first=5) = [[5, 1, 6, 7]]
    """
    counted = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1 + first
    return jnp.where(valid_BT, counted, 1)
