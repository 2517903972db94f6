"""Matrix products between activations and weights: the only function that looks inside a weight."""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Leaf


def einsum(equation: str, x: jax.Array, weight: jax.Array, axes: sharding.Axes) -> jax.Array:
    """`jnp.einsum` in the activation's dtype; the result is laid out by its logical `axes`.

    Weights keep Hugging Face's order, output features first ("BTD,NHD->BTNH"): importing needs
    no transpose, and contracting the last axis of both is the faster product on CPU.
    """
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
