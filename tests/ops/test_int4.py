"""Products with weights of 4 bits: each is that of the numbers which its codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import sharding
from llava_mini_jax.ops import einsum as products
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.einsum import einsum
from llava_mini_jax.ops.int4 import Int4Weight
from tests import tiny

fast_compilation = tiny.fast_compilation

# (weight, output axes, inputs of a group, axes of x and of the result on a mesh)
CASES = {
    "BTD,NHD->BTNH": ((4, 3, 64), 2, 16, (None,), ("heads", None)),
    "BTNH,DNH->BTD": ((10, 4, 24), 1, 32, ("heads", None), (None,)),
    "BTD,MD->BTM": ((101, 48), 1, 24, (None,), ("mlp",)),
    "BTM,DM->BTD": ((9, 40), 1, 40, ("mlp",), (None,)),
}
# Float32 sums of up to 96 products of numbers up to about 40, in another order.
ATOL = 1e-3


def numbers(shape: tuple[int, ...], channels: int, group: int) -> tuple[Int4Weight, np.ndarray]:
    """Random codes, and what they stand for, by the definition of a group."""
    rng = np.random.default_rng(0)
    out, inputs = shape[:channels], int(np.prod(shape[channels:]))
    codes = rng.integers(0, 16, (*out, inputs // group, group), np.uint8)
    zero = rng.integers(0, 17, (*out, inputs // group), np.uint8)
    scale = rng.uniform(0.1, 2, zero.shape).astype(np.float16)
    exact = (codes.astype(np.float32) - zero[..., None]) * scale[..., None].astype(np.float32)
    weight = Int4Weight(values=int4.pack(codes), scale=scale, zero=zero)
    return jax.tree.map(jnp.asarray, weight), exact.reshape(shape)


def activations(equation: str, shape: tuple[int, ...], channels: int, rows=(2, 3)) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((*rows, *shape[channels:])), jnp.float32)


@pytest.mark.parametrize("equation", CASES)
@pytest.mark.parametrize("together", [24, 2**18])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_every_product_on_one_cpu(equation, together, rows, monkeypatch) -> None:
    """In parts of one row or all; few rows in registers, six of them widened."""
    monkeypatch.setattr(products, "TOGETHER", together)
    taken, registers = [], int4.in_registers
    monkeypatch.setattr(int4, "in_registers", lambda *a: taken.append(1) or registers(*a))
    shape, channels, group, *_ = CASES[equation]
    weight, exact = numbers(shape, channels, group)
    np.testing.assert_array_equal(int4.dequantize(weight).reshape(shape), exact)
    x = activations(equation, shape, channels, rows)
    axes = (None,) * len(equation.split("->")[1])
    found = jax.jit(lambda x, w: einsum(equation, x, w, axes))(x, weight)
    assert bool(taken) == (rows == (1, 1))
    np.testing.assert_allclose(found, np.einsum(equation, x, exact), atol=ATOL)
    half = einsum(equation, x.astype(jnp.bfloat16), weight, axes)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), found, atol=0.02 * np.abs(found).max())


def test_one_group_of_all_inputs_is_not_unrolled(monkeypatch) -> None:
    """A program of a thousand pieces would compile for minutes."""
    monkeypatch.setattr(int4, "in_registers", None)
    weight, exact = numbers((5, 256), 1, 256)
    x = activations("BTD,MD->BTM", (5, 256), 1, (1, 1))
    found = einsum("BTD,MD->BTM", x, weight, (None,) * 3)
    np.testing.assert_allclose(found, np.einsum("BTD,MD->BTM", x, exact), atol=ATOL)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    ("mesh", "rows"), [((1, 1, 2), (2, 3)), ((1, 2, 1), (1, 3)), ((2, 2, 2), (4, 1))], ids=str
)
@pytest.mark.parametrize("equation", CASES)
def test_on_meshes_as_each_platform_computes_it(
    equation, mesh, rows, platform, monkeypatch
) -> None:
    """A group of all of `down_proj`'s inputs cannot be split over devices: then x is gathered."""
    taken, few = [], int4.few_rows
    monkeypatch.setattr(int4, "few_rows", lambda *a: taken.append(1) or few(*a))
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    shape, channels, group, of_x, of_outputs = CASES[equation]
    weight, exact = numbers(shape, channels, group)
    x = activations(equation, shape, channels, rows)
    right = np.einsum(equation, x, exact)
    gradient = 2 * np.einsum(_back(equation), right, exact)
    axes = ("batch", None, *of_outputs)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        inputs = {"heads": "heads", "mlp": "mlp", None: "embed"}[of_x[0]]
        outputs = tuple(axis or ("embed" if len(of_outputs) == 1 else None) for axis in of_outputs)
        placed = Int4Weight(
            values=sharding.place(weight.values, (*outputs, None, inputs)),
            scale=sharding.place(weight.scale, (*outputs, inputs)),
            zero=sharding.place(weight.zero, (*outputs, inputs)),
        )
        x = sharding.place(x, ("batch", None, *of_x))

        def square(x, weight):
            product = einsum(equation, x, weight, axes)
            return jnp.sum(product**2), product

        back = jax.jit(jax.grad(square, has_aux=True))
        found_gradient, found = back(x, placed)
    # Rows that are split over devices have no sums of their own.
    assert bool(taken) == (platform == "gpu" and rows != (4, 1))
    np.testing.assert_allclose(found, right, atol=ATOL)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-3, atol=0.1)


def _back(equation: str) -> str:
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    return f"{output},{right}->{left}"


def test_more_rows_on_a_gpu_are_products(monkeypatch) -> None:
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(int4, "few_rows", None)
    weight, exact = numbers((6, 64), 1, 32)
    x = activations("BTD,MD->BTM", (6, 64), 1, (1, products.FEW_ON_GPU + 1))
    with jax.set_mesh(sharding.make_mesh()):
        found = jax.jit(lambda x, w: einsum("BTD,MD->BTM", x, w, (None,) * 3))(x, weight)
    np.testing.assert_allclose(found, np.einsum("BTD,MD->BTM", x, exact), atol=ATOL)


def test_gradients_on_one_cpu_and_nothing_kept_widened() -> None:
    weight, exact = numbers((12, 64), 1, 32)
    x = activations("BTD,MD->BTM", (12, 64), 1)

    def square(x):
        return jnp.sum(einsum("BTD,MD->BTM", x, weight, (None,) * 3) ** 2)

    right = jax.grad(lambda x: jnp.sum(jnp.einsum("BTD,MD->BTM", x, exact) ** 2))(x)
    np.testing.assert_allclose(jax.grad(square)(x), right, rtol=1e-4, atol=0.05)
    with jax.set_mesh(sharding.make_mesh()):  # as accelerators do it
        _, back = jax.vjp(lambda x: einsum("BTD,MD->BTM", x, weight, (None,) * 3), x)
    kept = {leaf.size for leaf in jax.tree.leaves(back) if hasattr(leaf, "size")}
    assert weight.values.size in kept and 12 * 64 not in kept and 12 * 32 * 4 not in kept
