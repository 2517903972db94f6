"""Attention through each implementation: against a slow definition, in its gradients, in refusals.

Splash runs interpreted. cuDNN needs a GPU: what ops/cudnn.py makes of a call is checked with XLA in
cuDNN's place behind the same function of JAX.
"""

import logging
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.ops import attention as ops
from llava_mini_jax.ops import cudnn, splash
from llava_mini_jax.ops.masks import Mask
from tests import tiny

fast_compilation = tiny.fast_compilation

# float32 sums over 8 channels and at most 150 keys of values of order 1, against float64.
F32_ATOL = 4e-6
# bfloat16 keeps 8 bits: weights and values are rounded to 2**-9 before they are summed.
BF16_ATOL = 3e-2

H = 8
# queries, keys, heads, key heads
SHAPES = {
    "equal heads": (5, 9, 4, 4),
    "groups": (5, 9, 6, 2),
    "one key head": (4, 4, 4, 1),
    "beyond a block": (131, 150, 2, 1),
}


@pytest.fixture(params=["xla", "splash", "cudnn"])
def run(request, monkeypatch):
    if request.param == "cudnn":
        plain = jax.nn.dot_product_attention

        def stand_in(query, key, value, *, implementation, **rest):
            assert implementation == "cudnn"
            # cuDNN has no gradient for odd lengths: the compiler for GPUs says so, none on CPU.
            assert query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
            return plain(query, key, value, implementation="xla", **rest)

        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    functions = {
        "xla": ops.reference,
        "splash": partial(splash.attention, interpret=True),
        "cudnn": cudnn.attention,
    }
    return functions[request.param]


def random(shape: str, B: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    T, S, N, K = SHAPES[shape]
    rng = np.random.default_rng(T + N)
    q = rng.standard_normal((B, T, N, H))
    k, v = rng.standard_normal((2, B, K, S, H))
    return q, k, v


def masks(shape: str, kind: str, B: int = 2) -> Mask:
    T, S = SHAPES[shape][:2]
    rng = np.random.default_rng(S)
    valid = rng.random((B, S)) < 0.6
    valid[:, 0] = True
    segments = np.sort(rng.integers(0, 3, (B, S)), axis=1)
    return {
        "everything": Mask(),
        "causal": Mask(first=S - T),
        "valid": Mask(valid_BS=jnp.asarray(valid)),
        "causal and valid": Mask(first=S - T, valid_BS=jnp.asarray(valid)),
        "packed": Mask(
            first=S - T,
            query_segments_BT=jnp.asarray(segments[:, S - T :]),
            key_segments_BS=jnp.asarray(segments),
        ),
    }[kind]


KINDS = ("everything", "causal", "valid", "causal and valid", "packed")


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Every head, row and query by itself, in float64; query head n reads key head n // G."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys, values = k[b, n // group], v[b, n // group]
        if mask is not None:
            seen = np.asarray(mask)[b if len(mask) > 1 else 0, t]
            keys, values = keys[seen], values[seen]
        weights = np.exp(keys @ q[b, t, n] / np.sqrt(q.shape[3]))
        out[b, t, n] = weights @ values / weights.sum()
    return out


def f32(*arrays: np.ndarray) -> list[jnp.ndarray]:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_implementation_is_attention(run, shape: str, kind: str) -> None:
    q, k, v = random(shape)
    mask = masks(shape, kind)
    expected = reference(q, k, v, mask.dense(*SHAPES[shape][:2]))
    np.testing.assert_allclose(run(*f32(q, k, v), mask), expected, atol=F32_ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_each_implementation_has_the_references_gradients(run, kind: str) -> None:
    shape = "groups"
    q, k, v = f32(*random(shape))
    mask, weigh = masks(shape, kind), jnp.asarray(random(shape)[0], jnp.float32)

    def gradients(function):
        return jax.grad(lambda *a: (function(*a, mask) * weigh).sum(), argnums=(0, 1, 2))(q, k, v)

    for found, expected in zip(gradients(run), gradients(ops.reference), strict=True):
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(found, expected, atol=10 * F32_ATOL)


@pytest.mark.parametrize("run", ["xla", "cudnn"], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_window(run, shape: str, padded: bool) -> None:
    q, k, v = random(shape)
    valid_BS = masks(shape, "valid").valid_BS if padded else None
    first = SHAPES[shape][1] - SHAPES[shape][0]
    mask = Mask(first=first, valid_BS=valid_BS, window=3)
    dense = np.array(mask.dense(*SHAPES[shape][:2]))
    expected = reference(q, k, v, dense)
    np.testing.assert_allclose(run(*f32(q, k, v), mask), expected, atol=F32_ATOL)
    wider = run(*f32(q, k, v), Mask(first=first, valid_BS=valid_BS, window=5))
    several = np.array(Mask(first=first, valid_BS=valid_BS).dense(*SHAPES[shape][:2])).sum(-1) > 3
    assert not several.any() or float(np.abs(wider - expected).max()) > 1000 * F32_ATOL


@pytest.mark.parametrize("first", [0, 3, 14])
def test_a_block_behind_a_cache_whose_fill_is_data(run, first: int) -> None:
    """`first` as an array, and slots behind the block that hold something else's keys."""
    rng = np.random.default_rng(first)
    q = rng.standard_normal((2, 6, 4, H))
    k, v = rng.standard_normal((2, 2, 2, 20, H))
    valid = rng.random((2, 20)) < 0.7
    valid[:, 0] = True
    mask = Mask(first=jnp.int32(first), valid_BS=jnp.asarray(valid))
    found = jax.jit(lambda *a: run(*a[:3], Mask(first=a[3], valid_BS=mask.valid_BS)))(
        *f32(q, k, v), mask.first
    )
    np.testing.assert_allclose(found, reference(q, k, v, mask.dense(6, 20)), atol=F32_ATOL)


def test_a_query_without_keys_gets_something_finite(run) -> None:
    q, k, v = random("groups")
    valid = np.ones((2, 9), bool)
    valid[1] = False
    found = run(*f32(q, k, v), Mask(valid_BS=jnp.asarray(valid)))
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(found[0], reference(q[:1], k[:1], v[:1], None)[0], atol=F32_ATOL)


def test_bfloat16_in_and_out_with_softmax_in_float32(run) -> None:
    q, k, v = random("groups")
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    mask = masks("groups", "causal and valid")
    found = run(*rounded, mask)
    assert found.dtype == jnp.bfloat16
    exact = [np.asarray(a, np.float64) for a in rounded]
    expected = reference(*exact, mask.dense(5, 9))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=BF16_ATOL)


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "width", "chosen"),
    [
        ("auto", "cpu", "bfloat16", 128, "xla"),
        ("auto", "gpu", "bfloat16", 128, "cudnn"),
        ("auto", "gpu", "float16", 64, "cudnn"),
        ("auto", "gpu", "float32", 128, "xla"),
        ("auto", "gpu", "bfloat16", 132, "xla"),
        ("auto", "gpu", "bfloat16", 4, "xla"),
        ("auto", "tpu", "bfloat16", 64, "splash"),
        ("auto", "tpu", "float32", 80, "splash"),
        ("auto", "tpu", "float16", 128, "xla"),
        ("xla", "tpu", "bfloat16", 128, "xla"),
        ("splash", "cpu", "float32", 8, "splash"),
    ],
)
def test_what_is_chosen(asked, platform, dtype, width, chosen) -> None:
    assert ops.choose(asked, platform, jnp.dtype(dtype), width)[0] == chosen


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "width", "message"),
    [
        ("flash", "tpu", "bfloat16", 128, '"flash" is unknown; use one of auto, xla, cudnn, spla'),
        ("cudnn", "cpu", "bfloat16", 128, '"cudnn" needs a GPU, and this program is for CPU'),
        ("cudnn", "tpu", "bfloat16", 128, '"cudnn" needs a GPU, and this program is for TPU'),
        ("splash", "gpu", "bfloat16", 128, '"splash" needs a TPU, and this program is for GPU'),
        ("cudnn", "gpu", "float32", 128, "takes bfloat16 and float16, not float32"),
        ("cudnn", "gpu", "bfloat16", 256, "multiples of 8 wide up to 128, not 256"),
        ("splash", "tpu", "float16", 128, "takes bfloat16 and float32, not float16"),
    ],
)
def test_what_is_refused(asked, platform, dtype, width, message) -> None:
    with pytest.raises(InputError, match=message):
        ops.choose(asked, platform, jnp.dtype(dtype), width)


def test_a_window_is_refused_by_kernels_that_have_none() -> None:
    dtype = jnp.dtype("bfloat16")
    name, why = ops.choose("auto", "tpu", dtype, 128, windowed=True)
    assert name == "xla" and "it has no sliding window" in why
    with pytest.raises(InputError, match='"splash": it has no sliding window'):
        ops.choose("splash", "tpu", dtype, 128, windowed=True)
    assert ops.choose("auto", "gpu", dtype, 128, windowed=True)[0] == "cudnn"
    q, k, v = f32(*random("groups"))
    with pytest.raises(InputError, match="no sliding window"):
        ops.attention(q, k, v, Mask(first=0, window=2), "splash")


def test_auto_says_once_why_it_falls_back(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    ops._say_once.cache_clear()
    q, k, v = f32(*random("groups"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ops.attention(q, k, v, Mask())
    (line,) = caplog.messages
    assert "XLA in place of GPU's fused kernel" in line and "not float32" in line


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("PJRT C API cuda 12090", "9.0", ""),
        ("PJRT C API cuda 12090", "7.5", "needs compute capability 8.0, and this GPU has 7"),
        ("PJRT C API rocm 60200", "gfx90a", "it is CUDA's, and this is a Test GPU"),
    ],
)
def test_gpus_that_lack_cudnns_kernel(monkeypatch, version, capability, message) -> None:
    client = SimpleNamespace(platform_version=version)
    gpu = SimpleNamespace(client=client, compute_capability=capability, device_kind="Test GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    name, why = ops.choose("auto", "gpu", jnp.dtype("bfloat16"), 128)
    assert (name, message in why) == ("xla" if message else "cudnn", True)
    if message:
        with pytest.raises(InputError, match=message):
            ops.choose("cudnn", "gpu", jnp.dtype("bfloat16"), 128)


def test_few_queries_go_to_xla(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(splash, "attention", lambda q, *_, interpret: called.append(q.shape) or q)
    for queries in (127, 128):
        q = jnp.zeros((1, queries, 2, H))
        ops.attention(q, *(jnp.zeros((1, 2, 200, H)),) * 2, Mask(), "splash")
    assert called == [(1, 128, 2, H)]


@pytest.mark.parametrize(("N", "K", "H", "first"), [(32, 8, 128, 72), (16, 16, 64, None)])
def test_bfloat16_at_the_real_models_heads(run, N: int, K: int, H: int, first: int | None) -> None:
    """LLaMA-3.1-8B's text behind something, and the tower; forward and backward."""
    rng = np.random.default_rng(N)
    q = jnp.asarray(rng.standard_normal((1, 128, N, H)), jnp.bfloat16)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, 1, K, 200, H)))
    weigh = jnp.asarray(rng.standard_normal(q.shape), jnp.bfloat16)

    def both(function):
        out, back = jax.vjp(lambda *given: function(*given, Mask(first=first)), q, k, v)
        return out, *back(weigh)

    for found, expected in zip(both(run), both(ops.reference), strict=True):
        # bfloat16 keeps 2**-9 of a value. Both round a handful of times, at other places, and a
        # group's gradients are summed over its heads: eight roundings of the largest at most.
        scale = float(jnp.abs(expected.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=2**-6 * scale
        )
