"""Weights of matrix products as int8: half of bfloat16's memory, for inference.

    [out.., in..] --largest |w| of an output channel: 127--> Int8Weight --ops/einsum.py--> products

Only weights are rounded: activations, norms, biases and tables stay in the dtype of computing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.params import ParamSpec

# Looked up or added, so that there is no product whose scale could be taken out of it; and MQT's
# `into_llm`, which is published with its input features first.
_TABLES = ("embed_tokens", "position", "class_token", "query", "into_llm")
_LARGEST = 127
TOGETHER = 2**22  # numbers that are rounded together where that is done in parts
XLA_ALIGNMENT = 64  # bytes


def is_product(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter is what activations are multiplied with."""
    name = path.rsplit("/", 1)[-1]
    matrix = len(spec.shape) - spec.stacked > 1 and not name.endswith("bias")
    return matrix and name not in _TABLES


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


def quantize_parts(
    read: Callable[[slice], jax.Array], shape: tuple[int, ...], channels: int
) -> Int8Weight:
    """`quantize` of a weight that `read` gives some rows of: never there as a float as a whole.

    For CPUs: what is put together on the host lies on the device without a copy.
    """
    rows = max(1, TOGETHER // math.prod(shape[1:]))
    values, scale = aligned_empty(shape, np.int8), aligned_empty(shape[:channels], np.float32)
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        rounded = quantize(read(part), channels)
        values[part], scale[part] = np.asarray(rounded.values), np.asarray(rounded.scale)
    return Int8Weight(values=jax.device_put(values), scale=jax.device_put(scale))


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array whose memory a CPU device takes over; others it copies, and keeps for a while."""
    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(nbytes + XLA_ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % XLA_ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
