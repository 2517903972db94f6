"""Products with weights of every dtype: on one CPU in parts, elsewhere as they are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import sharding
from llava_mini_jax.ops import einsum as products
from llava_mini_jax.ops.einsum import Int8Weight, einsum
from tests import tiny

fast_compilation = tiny.fast_compilation

DTYPES = ("float32", "bfloat16", "float16", "int8")
# Sums of 24 products of numbers near 1, in another order; and rounded to the activation's dtype.
ATOL = {"float32": 2e-5, "bfloat16": 0.05, "float16": 6e-3}

EQUATIONS = {
    "BTD,NHD->BTNH": ((2, 3, 24), (5, 4, 24)),
    "BTNH,DNH->BTD": ((2, 3, 6, 4), (7, 6, 4)),
    "BTD,MD->BTM": ((1, 1, 24), (13, 24)),
    "BTD,VD->BTV": ((1, 2, 24), (101, 24)),
    "QE,NHE->QNH": ((3, 24), (2, 5, 24)),
    "IyuxvC,ECuv->IyxE": ((2, 3, 2, 3, 2, 6), (11, 6, 2, 2)),
    "IPE,QP->IQE": ((2, 24, 5), (7, 24)),
}


def arrays(equation: str, dtype: str, computing: str):
    rng = np.random.default_rng(0)
    x_shape, w_shape = EQUATIONS[equation]
    x = jnp.asarray(rng.standard_normal(x_shape), computing)
    if dtype == "int8":
        return x, jnp.asarray(rng.integers(-127, 128, w_shape), jnp.int8)
    return x, jnp.asarray(rng.standard_normal(w_shape), dtype)


def expected(equation: str, x, weight) -> np.ndarray:
    return np.einsum(equation, np.asarray(x, np.float64), np.asarray(weight, np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("together", [24, 60, 2**18])
def test_every_product(equation, dtype, together, monkeypatch) -> None:
    """Parts of one row and of some; 7, 11, 13 and 101 outputs are no multiple of any part."""
    monkeypatch.setattr(products, "TOGETHER", together)
    computing = "float32" if dtype == "int8" else dtype
    x, weight = arrays(equation, dtype, computing)
    axes = (None,) * len(equation.split("->")[1])
    found = jax.jit(lambda x, w: einsum(equation, x, w, axes))(x, weight)
    assert found.dtype == x.dtype
    scale = 127 if dtype == "int8" else 1
    right = expected(equation, x, weight)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), right, atol=scale * ATOL[computing], rtol=ATOL[computing]
    )


@pytest.mark.parametrize("rows", [1, 2, products.FEW, products.FEW + 1])
@pytest.mark.parametrize("inputs", [32, 48, 40])
def test_int8_in_registers_and_widened_first(rows, inputs, monkeypatch) -> None:
    """101 outputs in parts of 20 or 10; 40 inputs make no pieces, five rows are too many."""
    monkeypatch.setattr(products, "TOGETHER", 10 * inputs)
    taken = []
    in_registers = products._in_registers
    monkeypatch.setattr(products, "_in_registers", lambda *a: taken.append(1) or in_registers(*a))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, rows, inputs)), jnp.float32)
    weight = jnp.asarray(rng.integers(-127, 128, (101, inputs)), jnp.int8)
    found = jax.jit(lambda x, w: einsum("BTD,VD->BTV", x, w, (None,) * 3))(x, weight)
    assert bool(taken) == (rows <= products.FEW and inputs % products.PIECES == 0)
    np.testing.assert_allclose(
        found, expected("BTD,VD->BTV", x, weight), atol=127 * ATOL["float32"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_cpu_and_a_mesh_agree(dtype) -> None:
    computing = "float32" if dtype == "int8" else dtype
    x, weight = arrays("BTD,NHD->BTNH", dtype, computing)
    axes = ("batch", None, "heads", None)
    alone = einsum("BTD,NHD->BTNH", x, weight, axes)
    with jax.set_mesh(sharding.make_mesh()):
        meshed = jax.jit(lambda x, w: einsum("BTD,NHD->BTNH", x, w, axes))(x, weight)
    scale = 127 if dtype == "int8" else 1
    np.testing.assert_allclose(
        np.asarray(alone, np.float64),
        np.asarray(meshed, np.float64),
        atol=scale * ATOL[computing],
    )


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_few_rows_on_a_tpu(equation, dtype, monkeypatch) -> None:
    """Padded to 8 rows, which do not come out; more rows are left alone, and what is re-laid."""
    computing = "float32" if dtype == "int8" else dtype
    x, weight = arrays(equation, dtype, computing)
    axes = (None,) * len(equation.split("->")[1])

    def found() -> tuple:
        def product(x, w):  # a new function each time: JAX traces one only once
            return einsum(equation, x, w, axes)

        with jax.set_mesh(sharding.make_mesh()):
            return jax.jit(product)(x, weight), str(jax.make_jaxpr(product)(x, weight))

    plain, text = found()
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    padded, padded_text = found()
    assert "pad[" not in text
    outputs = len(set(equation.split(",")[1].split("->")[0]) - set(equation.split(",")[0]))
    few = plain.size < products.MXU_ROWS * np.prod(weight.shape[:outputs])
    relaid = dtype != "int8" and weight.ndim - outputs > 1
    assert ("pad[" in padded_text) == (few and not relaid)
    assert padded.shape == plain.shape
    np.testing.assert_allclose(
        np.asarray(padded, np.float32), np.asarray(plain, np.float32), rtol=ATOL[computing]
    )


def test_rows_of_a_mesh_on_a_tpu(monkeypatch) -> None:
    """Eight rows on eight devices are one a device, and padded; none at all stay none."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    weight = jnp.arange(24.0).reshape(4, 6)
    for rows, data in ((8, 8), (8, 1), (0, 1)):
        x = jnp.arange(rows * 6.0).reshape(rows, 1, 6)

        def product(x, w):
            return einsum("BTD,MD->BTM", x, w, ("batch", None, "mlp"))

        with jax.set_mesh(sharding.make_mesh(data)):
            placed = sharding.place(x, ("batch", None, None)), sharding.place(weight, (None, None))
            found, text = jax.jit(product)(*placed), str(jax.make_jaxpr(product)(*placed))
        assert ("pad[" in text) == (data == 8)
        np.testing.assert_allclose(found, x @ weight.T, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_weights(dtype) -> None:
    x, weight = arrays("BTD,MD->BTM", dtype, "float32")
    axes = ("batch", None, "mlp")

    def loss(x, weight):
        return jnp.square(einsum("BTD,MD->BTM", x, weight, axes)).sum()

    of_x, of_weight = jax.grad(loss, argnums=(0, 1))(x, weight)
    exact = jax.grad(loss, argnums=(0, 1))(x, weight.astype(jnp.float32))
    assert (of_x.dtype, of_weight.dtype) == (x.dtype, weight.dtype)
    np.testing.assert_allclose(of_x, exact[0], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        np.asarray(of_weight, np.float32), exact[1], atol=ATOL[dtype], rtol=0.01
    )


def test_scales_multiply_the_product() -> None:
    x, values = arrays("BTD,NHD->BTNH", "int8", "float32")
    scale = jnp.linspace(0.1, 2.0, 20).reshape(5, 4)
    found = einsum("BTD,NHD->BTNH", x, Int8Weight(values=values, scale=scale), (None,) * 4)
    right = expected("BTD,NHD->BTNH", x, values) * np.asarray(scale)
    np.testing.assert_allclose(found, right, atol=127 * 2 * ATOL["float32"])
