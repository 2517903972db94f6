"""Weights of 4 bits, two in a byte: how they lie, and products of activations with them.

    inputs, one after another  | group 0: 2 S of them | group 1 | ... | group G - 1 |
                                 low S, high S
    values [out.., S, G]  byte (s, g): code of low input s of group g + 16 * that of high input s
    scale, zero [out.., G]          weight = (code - zero) * scale

    x [.., I] --ordered--> low, high [.., S, G] --products with `halves` of the weight, added up

Not jnp.int4: XLA packs that as well, but numpy and `nbytes` count a byte for each, and XLA widens
it one by one on CPU and as a whole matrix on TPU (docs/performance.md). A byte's halves are never
put side by side, which would make a second matrix: each has a product of its own. Groups stand
last, so that scales meet weights lane by lane: a TPU unpacks in a quarter of the cycles.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Leaf

LARGEST = 15  # of a code


@struct.dataclass
class Int4Weight:
    """A weight in 4 bits: published forms (AWQ, GPTQ) have one zero and scale a group as well."""

    values: Leaf  # uint8 [out.., S, G]
    scale: Leaf  # float16 or another float [out.., G]
    zero: Leaf  # uint8 [out.., G]: the code of 0, from 0 to 16


def pack(codes: Any) -> Any:
    """`values` of codes uint8 [out.., G, 2 S], of numpy or JAX."""
    half = codes.shape[-1] // 2
    packed = codes[..., :half] | (codes[..., half:] << 4)
    return packed.swapaxes(-1, -2)


def halves(weight: Int4Weight, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The weights of low and of high inputs, each [out.., S, G]."""
    codes = weight.values.astype(jnp.int32)
    zero = weight.zero.astype(jnp.int32)[..., None, :]
    scale = weight.scale.astype(jnp.float32)[..., None, :]
    low, high = (
        ((half - zero).astype(jnp.float32) * scale).astype(dtype)
        for half in (codes & LARGEST, codes >> 4)
    )
    return low, high


def dequantize(weight: Int4Weight) -> jax.Array:
    """The weight in float32 [out.., I]: for those who compare, no product needs it."""
    grouped = jnp.concatenate(halves(weight, jnp.float32), axis=-2).swapaxes(-1, -2)
    return grouped.reshape(*grouped.shape[:-2], -1)


def ordered(x: jax.Array, kept: int, weight: Int4Weight) -> tuple[jax.Array, jax.Array]:
    """`x`, whose axes behind the first `kept` are inputs, as low and high ones [.., S, G]."""
    S, G = weight.values.shape[-2:]
    grouped = sharding.regroup(x, kept, (G, 2, S))
    low, high = (grouped[..., half, :].swapaxes(-1, -2) for half in (0, 1))
    return low, high


def product(x_RI: jax.Array, weight: Int4Weight) -> jax.Array:
    """[R, O] of a weight with one axis of outputs, widened as a whole."""
    return functools.reduce(
        operator.add,
        (
            jnp.einsum("RX,OX->RO", _flat(x_RSG), _flat(half_OSG))
            for x_RSG, half_OSG in zip(
                ordered(x_RI, 1, weight), halves(weight, x_RI.dtype), strict=True
            )
        ),
    )


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def in_registers(x_RI: jax.Array, weight: Int4Weight) -> jax.Array:
    """`product` of few rows on a CPU, in float32: nothing as large as the weight is written.

    Codes of a group are added up in registers; its zero and scale are there once, behind the sum.
    """
    # As einsum.py's: copied as bytes, since it is read at S places at once.
    weight = jax.lax.optimization_barrier(weight)
    scale, zero = weight.scale.astype(jnp.float32), weight.zero.astype(jnp.float32)
    found = []
    for low_SG, high_SG in zip(*ordered(x_RI, 1, weight), strict=True):
        sums_OG = -zero * (low_SG + high_SG).sum(0)
        for s in range(len(low_SG)):
            codes_OG = weight.values[:, s]
            low, high = codes_OG & LARGEST, codes_OG >> 4
            sums_OG += low.astype(jnp.float32) * low_SG[s] + high.astype(jnp.float32) * high_SG[s]
        # Else XLA makes one sum of both, which it does not vectorise.
        sums_OG = jax.lax.optimization_barrier(sums_OG * scale)
        found.append(sums_OG @ jnp.ones(sums_OG.shape[1]))
    return jnp.stack(found)


def few_rows(x: jax.Array, kept: int, weight: Int4Weight) -> jax.Array:
    """[rows, out..] of few rows on a GPU: sums, which XLA makes one kernel that reads bytes once.

    Of a product it would write the weight widened first, eight times the bytes. `x` has the rows
    in its first `kept` axes, none of them split over devices.
    """
    low, high = halves(weight, jnp.float32)
    rows = (half.reshape(-1, *half.shape[-2:]) for half in ordered(x, kept, weight))
    found = [jnp.sum(a * low + b * high, axis=(-2, -1)) for a, b in zip(*rows, strict=True)]
    return jnp.stack(found).astype(x.dtype)
