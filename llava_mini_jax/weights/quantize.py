"""Weights of matrix products as int8: half of bfloat16's memory, for inference.

    [out.., in..] --largest |w| of an output channel: 127--> Int8Weight --ops/einsum.py--> products

Only weights are rounded: activations, norms, biases and tables stay in the dtype of computing.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.params import ParamSpec

# Looked up or added, so that there is no product whose scale could be taken out of it.
_TABLES = ("embed_tokens", "position", "class_token", "query")
_LARGEST = 127


def is_product(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter is what activations are multiplied with."""
    name = path.rsplit("/", 1)[-1]
    return len(spec.shape) - spec.stacked > 1 and name != "bias" and name not in _TABLES


def channel_axes(spec: ParamSpec, outputs: int) -> int:
    """How many leading axes are layers and output features, of which a layer has `outputs`.

    Published weights are [outputs, inputs]; ours may have either of the two as heads and width.
    """
    for count in range(1 + spec.stacked, len(spec.shape)):
        if math.prod(spec.shape[spec.stacked : count]) == outputs:
            return count
    raise ValueError(f"no leading axes of {spec.shape} are {outputs} output features")


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def quantize(weight: jax.Array, channels: int) -> Int8Weight:
    """A weight whose first `channels` axes are output channels, each with a scale of its own.

    The error of a weight is at most half of its channel's scale.
    """
    inputs = tuple(range(channels, weight.ndim))
    largest = jnp.max(jnp.abs(weight), axis=inputs).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    values = jnp.round(weight / jnp.expand_dims(scale, inputs)).astype(jnp.int8)
    return Int8Weight(values=values, scale=scale)
