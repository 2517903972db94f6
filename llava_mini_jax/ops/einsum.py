"""Matrix products between activations and weights: the only function that looks inside a weight.

x, weight --on accelerators and meshes--> one product, as its equation says
          '--on one CPU--> x [R, I] times weight [O, I]; a weight that is narrower than
                           float32 some rows at a time, so that it never lies there in float32
                           '--int8 or int4, few rows--> not even these: widened in registers
int4 (int4.py): two products, of the low and the high halves of its bytes, or one sum on a GPU
a weight of low rank beside a frozen one (LoRA): both products, added up
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.int4 import Int4Weight
from llava_mini_jax.params import Leaf

# Numbers of a narrow weight that a CPU takes at a time: twice as many where they stay int8. With
# fewer, starting threads takes longer than the product; four times as many do not fit its caches.
TOGETHER = 2**20
# Rows of activations up to which int8 is widened in registers, and pieces of a row that are added
# up there. With eight pieces XLA does not vectorise the sum, with 32 it is no faster.
FEW, PIECES = 4, 16
# Of int4 there are as many pieces as bytes a group; of larger groups the program would be too long.
MOST_PIECES = 64
# Rows up to which a GPU adds int4 up instead of multiplying.
FEW_ON_GPU = 8
# Rows from which a TPU multiplies in its matrix unit: fewer are padded.
MXU_ROWS = 8


@struct.dataclass
class Int8Weight:
    """A weight as int8 (weights/quantize.py): `values` [out.., in..] times `scale` [out..]."""

    values: Leaf
    scale: Leaf  # float32


@struct.dataclass
class LoraWeight:
    """A frozen weight, and a change of low rank that is learnt (LoRA, Hu et al. 2021, section 4.1):
    `base` [out.., in..] + `scale` * `lora_b` [out.., rank] `lora_a` [rank, in..]."""

    base: Leaf  # an array, an Int8Weight or an Int4Weight
    lora_a: Leaf
    lora_b: Leaf
    scale: float = struct.field(pytree_node=False)


Weight = jax.Array | Int8Weight | Int4Weight | LoraWeight


def einsum(equation: str, x: jax.Array, weight: Weight, axes: sharding.Axes) -> jax.Array:
    """`jnp.einsum` in the activation's dtype; the result is laid out by its logical `axes`.

    Weights keep Hugging Face's order, output features first ("BTD,NHD->BTNH"): importing needs
    no transpose, and contracting the last axis of both is the faster product on CPU.
    """
    if isinstance(weight, Int8Weight):
        # A channel's scale may as well multiply its product, which is smaller than the weight.
        product = einsum(equation, x, weight.values, axes).astype(jnp.float32)
        # It may lie split along another axis, and an Explicit mesh refuses to multiply the two.
        scale = sharding.constrain(weight.scale, axes[-weight.scale.ndim :])
        return (product * scale).astype(x.dtype)
    if isinstance(weight, LoraWeight):
        return _with_change(equation, x, weight, axes)
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    # Output features are the letters that the weight alone has; they stand first in it.
    outputs = len(set(right) - set(left))
    if sharding.on_one_cpu() and output[-outputs:] == right[:outputs]:
        return _rows_times_matrix(x, left, weight, right, outputs)
    if isinstance(weight, Int4Weight):
        # Without it the widened weight would be kept for the backward pass.
        return jax.checkpoint(functools.partial(_with_int4, equation, axes))(x, weight)
    sizes = dict(zip(left + right, x.shape + weight.shape, strict=True))
    shape = tuple(sizes[letter] for letter in output)
    # Of two input axes (heads and their width) a float weight would be re-laid at every call.
    paddable = len(right) - outputs == 1 or weight.dtype == jnp.int8
    # Cast first: half the bytes to gather.
    weight = sharding.gather(weight.astype(x.dtype), x)
    if paddable:
        return _with_rows(equation, x, weight, shape, axes)
    return jnp.einsum(equation, x, weight, out_sharding=sharding.partition(shape, axes))


def _with_change(equation: str, x: jax.Array, weight: LoraWeight, axes: sharding.Axes) -> jax.Array:
    """The product with the base, and that with the change: through its rank, never as a matrix."""
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    rows = "".join(letter for letter in output if letter not in right)
    outputs, summed = (
        "".join(letter for letter in right if (letter in output) == kept) for kept in (True, False)
    )
    of_rows = tuple(axes[output.index(letter)] for letter in rows)
    low = einsum(f"{left},r{summed}->{rows}r", x, weight.lora_a, (*of_rows, None))
    change = einsum(f"{rows}r,{outputs}r->{output}", low, weight.lora_b, axes)
    return einsum(equation, x, weight.base, axes) + weight.scale * change


def _with_int4(equation: str, axes: sharding.Axes, x: jax.Array, weight: Int4Weight) -> jax.Array:
    """The product where inputs stand last in `x`, in the weight's order: a decoder layer's do."""
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    rows = "".join(letter for letter in left if letter in output)
    columns = "".join(letter for letter in right if letter in output)
    assert (left, right, output) == (rows + right[len(columns) :], right, rows + columns), equation
    kept = len(rows)
    shape = (*x.shape[:kept], *weight.scale.shape[: len(columns)])
    weight = jax.tree.map(lambda part: sharding.gather(part, x, learnt=False), weight)
    few = (
        math.prod(shape[:kept]) <= FEW_ON_GPU and sharding.piece(shape, axes)[:kept] == shape[:kept]
    )
    if sharding.platform() == "gpu" and few and x.size:
        return sharding.constrain(int4.few_rows(x, kept, weight).reshape(shape), axes)
    pairs = zip(int4.ordered(x, kept, weight), int4.halves(weight, x.dtype), strict=True)
    by_half = f"{rows}sg,{columns}sg->{output}"
    return functools.reduce(
        operator.add, (_with_rows(by_half, part, half, shape, axes) for part, half in pairs)
    )


def _with_rows(
    equation: str, x: jax.Array, weight: jax.Array, shape: tuple[int, ...], axes: sharding.Axes
) -> jax.Array:
    """The product, which has `shape`: on a TPU of at least MXU_ROWS rows, where there are any."""
    left, output = equation.split(",")[0], equation.split("->")[1]
    local = dict(zip(output, sharding.piece(shape, axes), strict=True))
    # The last of the row axes, as it is never split: positions, not the batch.
    *others, last = [letter for letter in left if letter in output]
    others, at = math.prod(local[letter] for letter in others), output.index(last)
    more = 0
    if sharding.platform() == "tpu" and 0 < others * shape[at] < MXU_ROWS:
        more = -(-MXU_ROWS // others) - shape[at]
        x = jnp.pad(x, [(0, more * (letter == last)) for letter in left])
        # Else the compiler sees through the zeros, and back to its vector unit.
        x = jax.lax.optimization_barrier(x)
    spec = sharding.partition((*shape[:at], shape[at] + more, *shape[at + 1 :]), axes)
    product = jnp.einsum(equation, x, weight, out_sharding=spec)
    return jax.lax.slice_in_dim(product, 0, shape[at], axis=at) if more else product


def _rows_times_matrix(
    x: jax.Array, left: str, weight: jax.Array | Int4Weight, right: str, outputs: int
) -> jax.Array:
    """The product with two indices each: of more, XLA for CPU copies the weights, transposed."""
    summed = right[outputs:]
    kept = [letter for letter in left if letter not in summed]
    x = x.transpose([left.index(letter) for letter in (*kept, *summed)])
    rows = x.shape[: len(kept)]
    x_RI = x.reshape(math.prod(rows), math.prod(x.shape[len(kept) :]))
    if isinstance(weight, Int4Weight):
        columns, narrow = weight.scale.shape[:outputs], True
        weight_OI: Any = jax.tree.map(lambda a: a.reshape(-1, *a.shape[outputs:]), weight)
    else:
        columns, narrow = weight.shape[:outputs], weight.dtype.itemsize < 4
        weight_OI = weight.reshape(math.prod(columns), x_RI.shape[1])
    product_RO = _widened(x_RI, weight_OI) if narrow else _product(x_RI, weight_OI)
    return product_RO.astype(x.dtype).reshape(*rows, *columns)


def _product(x_RI: jax.Array, weight_OI: jax.Array | Int4Weight) -> jax.Array:
    if isinstance(weight_OI, Int4Weight):
        return int4.product(x_RI, weight_OI)
    return jnp.einsum("RI,OI->RO", x_RI, weight_OI.astype(x_RI.dtype))


def _way(x_RI: jax.Array, weight_OI: jax.Array | Int4Weight) -> tuple[Callable, int]:
    """How some rows of a narrow weight are multiplied on a CPU, and how many numbers at a time."""
    if isinstance(weight_OI, Int4Weight):
        short, multiply = weight_OI.values.shape[1] <= MOST_PIECES, int4.in_registers
    else:
        short = weight_OI.dtype == jnp.int8 and x_RI.shape[1] % PIECES == 0
        multiply = _in_registers
    return (multiply, 2 * TOGETHER) if short and len(x_RI) <= FEW else (_product, TOGETHER)


@jax.custom_vjp
def _widened(x_RI: jax.Array, weight_OI: jax.Array | Int4Weight) -> jax.Array:
    """The product in float32, in which CPUs compute, with a few rows of the weight at a time.

    Left to itself, XLA widens the weights of all layers first: in front of a loop over tokens, and
    without a loop too. The weight is tied to the number of the rows so that nothing is moved out;
    the last rows, where they are fewer, begin earlier and are computed twice.
    """
    x_RI = x_RI.astype(jnp.float32)
    outputs, inputs = len(jax.tree.leaves(weight_OI)[0]), x_RI.shape[1]
    multiply, together = _way(x_RI, weight_OI)
    # At least two parts: XLA takes a loop of one apart.
    part = max(1, min(together // inputs, -(-outputs // 2)))

    def add(number: jax.Array, product_RO: jax.Array) -> jax.Array:
        weight, number = jax.lax.optimization_barrier((weight_OI, number))
        start = jnp.minimum(number * part, outputs - part)
        some_PI = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, part), weight)
        some_RP = multiply(x_RI, some_PI)
        return jax.lax.dynamic_update_slice_in_dim(product_RO, some_RP, start, axis=1)

    # All of it is written over. Made of `x`: XLA makes room for constants of all layers at once.
    room_RO = jnp.broadcast_to(x_RI[:, :1], (x_RI.shape[0], outputs))
    return jax.lax.fori_loop(0, -(-outputs // part), add, room_RO)


def _in_registers(x_RI: jax.Array, weight_PI: jax.Array) -> jax.Array:
    """The product of few rows with int8 weights; nothing as large as the weight is written.

    14,336 x 4,096 times one row, two cores of an EPYC: 3.3 ms, where widening first takes 4.1,
    reading the bytes twice 3.2, and `(weight * x).sum(-1)` 5.6. bfloat16 gains nothing: XLA
    widens it first in any case.
    """
    # Copied as int8: read at sixteen places at once, memory gives half as much.
    weight_PI = jax.lax.optimization_barrier(weight_PI)
    pieces = [piece.astype(jnp.float32) for piece in jnp.split(weight_PI, PIECES, axis=1)]
    found = []
    for x_I in x_RI:
        products = map(operator.mul, pieces, jnp.split(x_I, PIECES))
        # Else XLA makes one sum of both, which it does not vectorise.
        sums_PX = jax.lax.optimization_barrier(functools.reduce(operator.add, products))
        found.append(sums_PX @ jnp.ones(sums_PX.shape[1]))
    return jnp.stack(found)


def _forward(x_RI: jax.Array, weight_OI: jax.Array | Int4Weight) -> tuple[jax.Array, tuple]:
    return _widened(x_RI, weight_OI), (x_RI, weight_OI)


def _backward(given: tuple, gradient_RO: jax.Array) -> tuple[jax.Array, Any]:
    x_RI, weight_OI = given
    x = x_RI.astype(jnp.float32)
    if isinstance(weight_OI, Int4Weight) or weight_OI.dtype == jnp.int8:
        (of_x,) = jax.vjp(lambda x: _product(x, weight_OI), x)[1](gradient_RO)
        return of_x.astype(x_RI.dtype), jax.tree.map(_no_gradient, weight_OI)
    of_x, of_weight = jax.vjp(_product, x, weight_OI.astype(jnp.float32))[1](gradient_RO)
    return of_x.astype(x_RI.dtype), of_weight.astype(weight_OI.dtype)


def _no_gradient(frozen: jax.Array) -> Any:
    """Whole numbers have none: JAX wants a type of its own for that."""
    whole = jnp.issubdtype(frozen.dtype, jnp.integer)
    return np.zeros(frozen.shape, jax.dtypes.float0) if whole else jnp.zeros_like(frozen)


_widened.defvjp(_forward, _backward)


@struct.dataclass
class Linear:
    """A weight with a bias of its output's shape."""

    kernel: Leaf
    bias: Leaf


def linear(equation: str, x: jax.Array, params: Linear, axes: sharding.Axes) -> jax.Array:
    return einsum(equation, x, params.kernel, axes) + params.bias.astype(x.dtype)
