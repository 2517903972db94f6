"""What methods share that choose among patches by the tower's attention.

    class token's query, keys of a layer --class_attention--> how much it looks at each patch
    scores --ranks--> 0 for the highest, ...; of equal ones the first comes first

All in float32 and full precision: what is chosen jumps where two scores swap.

Dimensions: I images, P patches, S = P + 1 with the class token first, N heads, H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.params import Array


def full(equation: str, *arrays: Any) -> Array:
    """An einsum of float32 numbers, which no accelerator may round."""
    arrays = tuple(array.astype(jnp.float32) for array in arrays)
    return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


def class_attention(query_INH: Array, keys_ISNH: Array, *, scale: float) -> Array:
    """Attention [I, N, P] of the class token to the patches; its own share is left out, so that a
    row's sum is below 1."""
    scores_INS = full("INH,ISNH->INS", query_INH, keys_ISNH) * scale
    return jax.nn.softmax(scores_INS)[..., 1:]


def ranks(scores: Array) -> Array:
    """The place of each score among those of the last axis, falling: 0 for the highest."""
    return jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)


def unit(x: Array) -> Array:
    """Vectors of length 1, as torch.nn.functional.normalize makes them."""
    length = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)


def take(x_IPE: Array, places_IQ: Array) -> Array:
    """x [I, Q, E] at places of the second axis."""
    return jnp.take_along_axis(x_IPE, places_IQ[..., None], axis=1)
