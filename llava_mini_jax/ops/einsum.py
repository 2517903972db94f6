"""Matrix products between activations and weights: the only function that looks inside a weight."""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Leaf


@struct.dataclass
class Int8Weight:
    """A weight as int8 (weights/quantize.py): `values` [out.., in..] times `scale` [out..]."""

    values: Leaf
    scale: Leaf  # float32


Weight = jax.Array | Int8Weight


def einsum(equation: str, x: jax.Array, weight: Weight, axes: sharding.Axes) -> jax.Array:
    """`jnp.einsum` in the activation's dtype; the result is laid out by its logical `axes`.

    Weights keep Hugging Face's order, output features first ("BTD,NHD->BTNH"): importing needs
    no transpose, and contracting the last axis of both is the faster product on CPU.
    """
    if isinstance(weight, Int8Weight):
        # A channel's scale may as well multiply its product, which is smaller than the weight.
        product = einsum(equation, x, weight.values, axes).astype(jnp.float32)
        scale = sharding.constrain(weight.scale, axes[-weight.scale.ndim :])
        return (product * scale).astype(x.dtype)
    weight = weight.astype(x.dtype)
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    sizes = dict(zip(left + right, x.shape + weight.shape, strict=True))
    spec = sharding.partition(tuple(sizes[letter] for letter in output), axes)
    return jnp.einsum(equation, x, weight, out_sharding=spec)


@struct.dataclass
class Linear:
    """A weight with a bias of its output's shape."""

    kernel: Leaf
    bias: Leaf


def linear(equation: str, x: jax.Array, params: Linear, axes: sharding.Axes) -> jax.Array:
    return einsum(equation, x, params.kernel, axes) + params.bias.astype(x.dtype)
