"""fold_layers scanned, unrolled and with remat gives the same; norms and products in float64."""

import collections

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.ops.einsum import Linear, einsum, linear
from llava_mini_jax.ops.layers import REMAT, attention_name, fold_layers
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, rms_norm

# float32 against float64 on values of order 1, and the same program compiled in another way.
F32_ATOL = 2e-6


def block(layer, x, shift):
    y = jnp.tanh(attention_name(jnp.sin(x)) @ layer["kernel"] + shift)
    return y, {"sum": y.sum(), "row": y[0]}


@pytest.fixture(scope="module")
def stack():
    rng = np.random.default_rng(0)
    layers = {"kernel": rng.standard_normal((3, 4, 4)).astype(np.float32)}
    return layers, rng.standard_normal((2, 4)).astype(np.float32), np.arange(3, dtype=np.float32)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_layers_run_in_order_and_their_outputs_are_stacked(stack, unrolled, remat) -> None:
    layers, x, shifts = stack
    given = param_tree.unstack(layers) if unrolled else layers
    found, outputs = fold_layers(block, given, x, shifts, remat=remat)
    expected = x.astype(np.float64)
    for i in range(3):
        expected = np.tanh(np.sin(expected) @ layers["kernel"][i] + i)
        np.testing.assert_allclose(outputs["row"][i], expected[0], atol=F32_ATOL)
        np.testing.assert_allclose(outputs["sum"][i], expected.sum(), atol=10 * F32_ATOL)
    np.testing.assert_allclose(found, expected, atol=F32_ATOL)


def total(layers, stack, remat):
    _, x, shifts = stack
    return fold_layers(block, layers, x, shifts, remat=remat)[0].sum()


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_remat_changes_no_gradient(stack, unrolled, remat) -> None:
    plain, again = (jax.grad(total)(stack[0], stack, r)["kernel"] for r in ("none", remat))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(plain, again, atol=F32_ATOL)


@pytest.mark.parametrize(
    ("remat", "recomputed"),
    # How often each operation of the three layers is computed again, in an unrolled stack.
    [
        ("none", dict(sin=0, dot_general=0)),
        ("matmuls", dict(sin=3, dot_general=0)),
        ("attention", dict(sin=0, dot_general=3)),
        ("full", dict(sin=3, dot_general=3)),
    ],
)
def test_what_is_computed_again(stack, remat, recomputed) -> None:
    counts = []
    for policy in (remat, "none"):
        program = jax.make_jaxpr(jax.grad(lambda t: total(t[0], (None, *t[1:]), policy)))  # noqa: B023
        jaxpr = program((param_tree.unstack(stack[0]), *stack[1:])).jaxpr
        counts.append(collections.Counter(operations(jaxpr)))
    for name, times in recomputed.items():
        assert counts[0][name] - counts[1][name] == times, name


def operations(jaxpr):
    """Names of all primitives, those inside calls included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for sub in jex.core.jaxprs_in_params(eqn.params):
            yield from operations(sub)


def test_an_unknown_remat_is_refused(stack) -> None:
    with pytest.raises(ValueError, match="remat 'some' is unknown; use one of none, matmuls, att"):
        total(stack[0], stack, "some")


def test_norms() -> None:
    x = 3 + 2 * np.random.default_rng(1).standard_normal((3, 16))
    scale, bias = np.linspace(0.5, 1.5, 16), np.linspace(-1, 1, 16)
    eps = 0.1  # large, so that forgetting it shows
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias
    given = LayerNorm(scale=jnp.float32(scale), bias=jnp.float32(bias))
    np.testing.assert_allclose(layer_norm(jnp.float32(x), given, eps), expected, atol=F32_ATOL)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(
        rms_norm(jnp.float32(x), jnp.float32(scale), eps), expected, atol=F32_ATOL
    )


def test_norms_are_computed_in_float32_and_keep_the_dtype() -> None:
    # In bfloat16 the mean of these squares would be off by a percent.
    x = jnp.linspace(1, 2, 4096, dtype=jnp.bfloat16)[None]
    exact = np.asarray(x, np.float64)
    expected = exact / np.sqrt((exact**2).mean())
    found = rms_norm(x, jnp.ones(4096, jnp.bfloat16), 1e-6)
    assert found.dtype == jnp.bfloat16
    rounded = expected.astype(found.dtype).astype(np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), rounded, rtol=2**-8)
    weights = LayerNorm(scale=jnp.ones(4096, jnp.bfloat16), bias=jnp.zeros(4096, jnp.bfloat16))
    assert layer_norm(x, weights, 1e-6).dtype == jnp.bfloat16


def test_products_are_in_the_dtype_of_the_activation() -> None:
    rng = np.random.default_rng(2)
    x, kernel, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4), (5, 4), (5,)))
    found = linear("BTD,ED->BTE", x, Linear(kernel=kernel, bias=bias), (None, None, None))
    np.testing.assert_allclose(found, x @ kernel.T + bias, atol=F32_ATOL)
    low = einsum("BTD,ED->BTE", jnp.bfloat16(x), jnp.asarray(kernel), (None, None, None))
    assert low.dtype == jnp.bfloat16
