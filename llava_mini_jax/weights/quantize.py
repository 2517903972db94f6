"""Weights of matrix products as int8 or int4: a half or a quarter of bfloat16's memory.

    [out.., in..] --largest |w| of an output channel: 127------------> Int8Weight --.
                  '-int4: smallest and largest of a group: 0 and 15--> Int4Weight --ops/einsum.py

Only weights are rounded: activations, norms, biases and tables stay in the dtype of computing.
int4 is for decoder layers alone, of the language model and of pre-fusion, which are nine tenths of
a model: tower, projector, compressor and head are int8 then, where AWQ and GPTQ leave them as they
are. Its groups are of 64 inputs, as QLoRA's are: of normal weights the error is 9.1 % of their
size, in groups of 128 (AWQ's and GPTQ's, which are fitted to activations) 10.1, of 32 8.1; a
weight takes 4.4 bits then, for 4.2 and 4.8. With 0 in the middle of the codes it would be 10.8.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.ops.int4 import Int4Weight
from llava_mini_jax.params import ParamSpec

# Looked up or added, so that there is no product whose scale could be taken out of it; and MQT's
# `into_llm`, which is published with its input features first.
_TABLES = ("embed_tokens", "position", "class_token", "query", "into_llm")
_DECODER = re.compile(r"(llm|prefusion)/layers/(\d+/)?\w+_proj")
GROUPS = (64, 32)  # inputs with one scale in int4: the first that divides a weight's
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


def group_of(inputs: int) -> int | None:
    """How many inputs have a scale of their own in int4; None where no size divides them."""
    return next((size for size in GROUPS if inputs % size == 0), None)


def in_decoder(path: str) -> bool:
    """Whether a weight is a decoder layer's, and may be int4."""
    return _DECODER.fullmatch(path) is not None


def form_of(path: str, spec: ParamSpec, channels: int, narrow: str | None) -> str | None:
    """What a parameter becomes where weights are rounded to `narrow`; None: it stays as it is."""
    if narrow is None or not is_product(path, spec):
        return None
    divided = group_of(math.prod(spec.shape[channels:])) is not None
    return "int4" if narrow == "int4" and divided and in_decoder(path) else "int8"


def abstract(
    path: str, spec: ParamSpec, channels: int, narrow: str | None, dtype: Any
) -> jax.ShapeDtypeStruct | Int8Weight | Int4Weight:
    """A parameter as it is loaded, as shapes on the current mesh; in `dtype` if not rounded."""
    form = form_of(path, spec, channels, narrow)
    if form is None:
        return param_tree.abstract(spec, dtype)
    if form == "int4":
        size = group_of(math.prod(spec.shape[channels:]))
        assert size is not None
        return abstract_int4(spec, channels, size, jnp.float16)
    scale = ParamSpec(spec.shape[:channels], spec.axes[:channels], spec.init)
    return Int8Weight(param_tree.abstract(spec, jnp.int8), param_tree.abstract(scale))


def abstract_int4(spec: ParamSpec, channels: int, size: int, scale: Any) -> Int4Weight:
    """Shapes of a weight in groups of `size` inputs whose scales are of that dtype."""
    return jax.tree.map(
        param_tree.abstract,
        int4_specs(spec, channels, size),
        Int4Weight(values=jnp.uint8, scale=jnp.dtype(scale), zero=jnp.uint8),
    )


def int4_specs(spec: ParamSpec, channels: int, size: int) -> Int4Weight:
    """The spec of each part: groups lie where the first axis of the inputs lies."""
    groups, (first, *_) = math.prod(spec.shape[channels:]) // size, spec.axes[channels:]

    def part(shape: tuple[int, ...], axes: sharding.Axes) -> ParamSpec:
        shape, axes = (*spec.shape[:channels], *shape), (*spec.axes[:channels], *axes)
        return ParamSpec(shape, axes, spec.init)

    group = part((groups,), (first,))
    values = part((size // 2, groups), (None, first))
    return Int4Weight(values=values, scale=group, zero=group)


def quantize(weight: jax.Array, channels: int, form: str = "int8") -> Int8Weight | Int4Weight:
    """A weight whose first `channels` axes are output channels, rounded to "int8" or "int4".

    The error is at most half of the scale of a weight's channel, or group. `weight` is given away.
    """
    if form == "int8":
        return _to_int8(weight, channels)
    rounded = _to_int4(weight, channels)
    weight.delete()  # jit cannot donate what no output has the shape of
    return rounded


def rounded_shapes(weight: jax.ShapeDtypeStruct, channels: int, form: str) -> Any:
    """Those of what `quantize` gives, laid out on the current mesh."""
    function = _to_int4 if form == "int4" else _to_int8
    return jax.eval_shape(lambda weight: function(weight, channels), weight)


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _to_int8(weight: jax.Array, channels: int) -> Int8Weight:
    inputs = tuple(range(channels, weight.ndim))
    largest = jnp.max(jnp.abs(weight), axis=inputs).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    values = jnp.round(weight / jnp.expand_dims(scale, inputs)).astype(jnp.int8)
    return Int8Weight(values=values, scale=scale)


@partial(jax.jit, static_argnums=1)
def _to_int4(weight: jax.Array, channels: int) -> Int4Weight:
    inputs = math.prod(weight.shape[channels:])
    size = group_of(inputs)
    if size is None:
        raise ValueError(f"{inputs} inputs make no groups of {' or '.join(map(str, GROUPS))}")
    grouped = sharding.regroup(weight, channels, (inputs // size, size)).astype(jnp.float32)
    # 0 has a code: padding and pruned weights stay exactly 0.
    least, most = jnp.minimum(grouped.min(-1), 0), jnp.maximum(grouped.max(-1), 0)
    scale = ((most - least) / int4.LARGEST).astype(jnp.float16)
    scale = jnp.where(scale > 0, scale, jnp.float16(1))
    # By the scale as it is kept: its own rounding is no error of the weights then.
    step = scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-least / step), 0, int4.LARGEST)
    codes = jnp.round(grouped / step[..., None]) + zero[..., None]
    codes = jnp.clip(codes, 0, int4.LARGEST).astype(jnp.uint8)
    return Int4Weight(values=int4.pack(codes), scale=scale, zero=zero.astype(jnp.uint8))


def quantize_parts(
    read: Callable[[slice], jax.Array], shape: tuple[int, ...], channels: int, form: str = "int8"
) -> Int8Weight | Int4Weight:
    """`quantize` of a weight that `read` gives some rows of: never there as a float as a whole.

    For CPUs: what is put together on the host lies on the device without a copy.
    """
    rows = max(1, TOGETHER // math.prod(shape[1:]))
    made = rounded_shapes(jax.ShapeDtypeStruct(shape, jnp.float32), channels, form)
    arrays = jax.tree.map(lambda part: aligned_empty(part.shape, part.dtype), made)
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        rounded = quantize(read(part), channels, form)
        for array, some in zip(*map(jax.tree.leaves, (arrays, rounded)), strict=True):
            array[part] = np.asarray(some)
    return jax.tree.map(jax.device_put, arrays)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array whose memory a CPU device takes over; others it copies, and keeps for a while."""
    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(nbytes + XLA_ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % XLA_ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def put(array: np.ndarray, spec: ParamSpec) -> jax.Array:
    """An array of the host as the parameter that `spec` says, in its shards."""
    array = array.reshape(spec.shape)
    placed = sharding.partition(spec.shape, spec.axes)
    if placed is None:
        own = aligned_empty(spec.shape, array.dtype)
        own[...] = array
        return jax.device_put(own)
    placed = jax.NamedSharding(jax.sharding.get_mesh(), placed)
    return jax.make_array_from_callback(spec.shape, placed, lambda index: array[index])
