"""Compressors: bicubic positions against torch, pooling against loops, what attention sees."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.models import compressors
from llava_mini_jax.models.compressors import GridConfig
from llava_mini_jax.models.compressors.positions import resize_positions, sincos
from llava_mini_jax.models.seen import Seen
from tests import tiny

fast_compilation = tiny.fast_compilation

# Sums of at most 16 products of values of order 5 in float32; torch rounds its weights as well.
RESIZE_ATOL = 5e-6
# One attention over 16 patches of order 1, float32 against float64.
ATOL = 5e-6


@functools.partial(jax.jit, static_argnames="cfg")
def apply(params, patches, cfg):
    found = compressors.apply(params, Seen(patches), cfg)
    assert found.valid_IQ is None
    return found.tokens_IQE, found.attention_IQP


# torch.nn.functional.interpolate(table, size, mode="bicubic", align_corners=False), torch 2.13.
TORCH_BICUBIC = [
    (
        [[-3.0, 0.0], [4.0, -4.0]],
        [
            [-4.1770477, -2.7957458, -0.5206604, 0.8606415],
            [-1.4676208, -1.2990112, -1.0213013, -0.8526917],
            [2.9949646, 1.1661987, -1.8458862, -3.6746521],
            [5.7043915, 2.6629333, -2.3465271, -5.3879852],
        ],
    ),
    (
        [[-3.0, 0.0, -2.0], [4.0, -4.0, 5.0], [0.0, 3.0, 1.0]],
        [
            [-4.0613761, -1.8782395, 0.3839998, -1.1942412, -2.9653764],
            [0.2017612, -1.015599, -2.0559995, -0.3315987, 1.2977611],
            [4.7680001, 0.2479997, -4.0, 0.9320022, 5.8640003],
            [2.2537584, 1.0363997, -0.0039989, 1.7204005, 3.3497589],
            [-0.7733757, 1.4097606, 3.6720002, 2.0937593, 0.3226246],
        ],
    ),
    (
        [
            [-3.0, 0.0, -2.0, 2.0],
            [4.0, -4.0, 5.0, -2.0],
            [0.0, 3.0, 1.0, 5.0],
            [-4.0, -1.0, -3.0, 1.0],
        ],
        [[-1.3154297, 1.0341797], [-0.0751953, 0.8564453]],
    ),
    ([[-3.0]], [[-3.0] * 3] * 3),
]


@pytest.mark.parametrize(("table", "expected"), TORCH_BICUBIC, ids=["2-4", "3-5", "4-2", "1-3"])
def test_positions_are_resized_as_torch_does(table: list, expected: list) -> None:
    grid, side = len(table), len(expected)
    position = np.stack([np.ravel(table), -np.ravel(table)], axis=1).astype(np.float32)
    found = resize_positions(jnp.asarray(position), grid, side)
    np.testing.assert_allclose(found[:, 0], np.ravel(expected), atol=RESIZE_ATOL)
    np.testing.assert_allclose(found[:, 1], -np.ravel(expected), atol=RESIZE_ATOL)


def test_positions_of_the_same_size_are_unchanged() -> None:
    position = jnp.asarray(np.random.default_rng(0).standard_normal((9, 4)), jnp.bfloat16)
    assert resize_positions(position, 3, 3) is position


@pytest.mark.parametrize(("side", "grid"), [(4, 1), (4, 2), (5, 3), (5, 2), (3, 3), (24, 8)])
def test_average_pooling_is_adaptive(side: int, grid: int) -> None:
    patches = np.random.default_rng(0).standard_normal((2, side * side, 3)).astype(np.float32)
    cfg = config("average_pool", grid)
    found, attention = apply(None, jnp.asarray(patches), cfg)
    image = patches.reshape(2, side, side, 3)
    expected = np.zeros((2, grid, grid, 3))
    for y, x in np.ndindex(grid, grid):
        rows = slice(y * side // grid, math.ceil((y + 1) * side / grid))
        columns = slice(x * side // grid, math.ceil((x + 1) * side / grid))
        expected[:, y, x] = image[:, rows, columns].mean(axis=(1, 2))
    np.testing.assert_allclose(found, expected.reshape(2, grid * grid, 3), atol=ATOL)
    assert attention is None


def test_average_pooling_is_that_of_torch() -> None:
    # torch.nn.functional.adaptive_avg_pool2d of squares 0..24, torch 2.13.
    squares = (jnp.arange(25.0) ** 2).reshape(1, 25, 1)
    found, _ = apply(None, squares, config("average_pool", 3))
    expected = [15.5, 27.166666, 42.5, 127.166664, 161.33333, 199.16667, 330.5, 387.16666, 447.5]
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-6)


def config(kind: str, grid: int, width: int = 32) -> GridConfig:
    return GridConfig(kind=kind, width=width, heads=8, grid=grid, norm_eps=1e-5)


def random(cfg: GridConfig):
    spec = compressors.spec(cfg)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32),
        spec,
        is_leaf=lambda x: hasattr(x, "axes"),
    )


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["similarity", "multi_head", "average_pool"])
def test_any_grid_gives_so_many_tokens(kind: str, grid: int) -> None:
    cfg = config(kind, grid)
    patches = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 32)), jnp.float32)
    tokens, attention = apply(random(cfg), patches, cfg)
    assert tokens.shape == (2, grid**2, 32)
    assert bool(jnp.isfinite(tokens).all())
    if attention is not None:
        assert attention.shape == (2, grid**2, 16)
        np.testing.assert_allclose(attention.sum(-1), 1.0, atol=ATOL)


def test_similarity_tokens_are_averages_of_patches_without_positions() -> None:
    cfg = config("similarity", 2)
    patches = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 32)), jnp.float32)
    tokens, attention = apply(random(cfg), patches, cfg)
    np.testing.assert_allclose(tokens, attention @ patches, atol=ATOL)
    # Equal patches everywhere come out as they are: values carry no position.
    tokens, _ = apply(random(cfg), jnp.ones((1, 16, 32)), cfg)
    np.testing.assert_allclose(tokens, 1.0, atol=ATOL)


def test_similarity_positions_tell_places_apart_even_with_one_query() -> None:
    cfg = config("similarity", 1)
    patches = np.zeros((1, 16, 32), np.float32)
    _, attention = apply(random(cfg), jnp.asarray(patches), cfg)
    assert float(attention.std()) > 0.01


def test_multi_head_with_one_query_knows_no_places() -> None:
    """The release's form, against the paper: a table of one row is the same for every key."""
    cfg = config("multi_head", 1)
    params = random(cfg)
    patches = np.random.default_rng(1).standard_normal((1, 16, 32)).astype(np.float32)
    order = np.random.default_rng(2).permutation(16)
    tokens, _ = apply(params, jnp.asarray(patches), cfg)
    shuffled, _ = apply(params, jnp.asarray(patches[:, order]), cfg)
    np.testing.assert_allclose(tokens, shuffled, atol=1e-4)
    cfg = config("multi_head", 2)
    tokens, _ = apply(random(cfg), jnp.asarray(patches), cfg)
    shuffled, _ = apply(random(cfg), jnp.asarray(patches[:, order]), cfg)
    assert float(jnp.abs(tokens - shuffled).max()) > 0.01


def test_none_gives_the_patches() -> None:
    cfg = config("none", 1)
    patches = jnp.ones((2, 9, 32))
    tokens, attention = apply(None, patches, cfg)
    np.testing.assert_array_equal(tokens, patches)
    assert attention is None
    assert compressors.spec(cfg) is None


def test_the_position_table_starts_as_sinusoids_of_column_and_row() -> None:
    table = sincos(3, 8)
    omega = [1.0, 10000**-0.5]
    for y, x in np.ndindex(3, 3):
        expected = [f(place * w) for place in (x, y) for f in (math.sin, math.cos) for w in omega]
        np.testing.assert_allclose(table[y * 3 + x], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "magic.*none, average_pool, similarity, multi_head"),
        ({"width": 30}, "30 is not a multiple of 4"),
        ({"kind": "multi_head", "width": 20}, "20 is not divided by 8 heads"),
    ],
)
def test_impossible_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config("similarity", 1), **changes)


def test_patches_that_are_no_square() -> None:
    with pytest.raises(ValueError, match="15 patches do not form a square grid"):
        apply(None, jnp.ones((1, 15, 32)), config("average_pool", 1))
