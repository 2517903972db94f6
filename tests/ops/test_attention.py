"""Attention: grouped heads against a reference that repeats them, masks, types."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.ops.attention import attention

# float32 sums over 8 channels and 9 keys of values of order 1, against float64.
F32_ATOL = 2e-6
# bfloat16 keeps 8 bits: weights and values are rounded to 2**-9 before they are summed.
BF16_ATOL = 3e-2

B, T, S, H = 2, 5, 9, 8


def random(heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(heads * 10 + kv_heads)
    q = rng.standard_normal((B, T, heads, H))
    k, v = rng.standard_normal((2, B, S, kv_heads, H))
    mask = rng.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    return q, k, v, mask


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Every head, row and query by itself, in float64; query head n reads key head n // G."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys, values = k[b, :, n // group], v[b, :, n // group]
        if mask is not None:
            keys, values = keys[mask[b, t]], values[mask[b, t]]
        weights = np.exp(keys @ q[b, t, n] / np.sqrt(q.shape[3]))
        out[b, t, n] = weights @ values / weights.sum()
    return out


def f32(*arrays: np.ndarray) -> list[jnp.ndarray]:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_heads(heads: int, kv_heads: int, masked: bool) -> None:
    q, k, v, mask = random(heads, kv_heads)
    found = attention(*f32(q, k, v), jnp.asarray(mask) if masked else None)
    expected = reference(q, k, v, mask if masked else None)
    np.testing.assert_allclose(found, expected, atol=F32_ATOL)


def test_a_query_without_keys_gets_the_finite_mean() -> None:
    q, k, v, mask = random(4, 2)
    mask[1, 3] = False
    found = attention(*f32(q, k, v), jnp.asarray(mask))
    mean = np.repeat(v[1].mean(axis=0), 2, axis=0)
    np.testing.assert_allclose(found[1, 3], mean, atol=F32_ATOL)
    mask[1, 3, 0] = True
    rest = np.ones((B, T), bool)
    rest[1, 3] = False
    np.testing.assert_allclose(found[rest], reference(q, k, v, mask)[rest], atol=F32_ATOL)


def test_bfloat16_in_and_out_with_softmax_in_float32() -> None:
    q, k, v, mask = random(4, 2)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    found = attention(*rounded, jnp.asarray(mask))
    assert found.dtype == jnp.bfloat16
    exact = [np.asarray(a, np.float64) for a in rounded]
    expected = reference(*exact, mask)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=BF16_ATOL)
