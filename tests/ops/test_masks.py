"""Masks and position ids: the worked examples of their docstrings, and a slow definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.ops import masks
from llava_mini_jax.ops.masks import Mask


def test_the_docstring_example_of_a_mask() -> None:
    mask = Mask(first=2, valid_BS=jnp.array([[1, 1, 0, 1, 1]], bool)).dense(2, 5)
    assert mask is not None and mask.dtype == bool
    assert mask.astype(int).tolist() == [[[1, 1, 0, 0, 0], [1, 1, 0, 1, 0]]]
    windowed = Mask(first=2, valid_BS=jnp.array([[1, 1, 0, 1, 1]], bool), window=2).dense(2, 5)
    assert windowed is not None
    assert windowed.astype(int).tolist() == [[[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]]]
    assert masks.seen_from(jnp.array([2]), 5, window=2).astype(int).tolist() == [[0, 1, 1, 0, 0]]


@pytest.mark.parametrize("first", [0, 3, jnp.int32(3)])
@pytest.mark.parametrize("window", [1, 2, 5, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_is_the_last_valid_keys(first, window: int, padded: bool) -> None:
    valid = np.random.default_rng(window).random((2, 7)) < 0.6 if padded else np.ones((2, 7), bool)
    found = Mask(first, jnp.asarray(valid) if padded else None, window=window).dense(4, 7)
    assert found is not None
    for b, t in np.ndindex(2, 4):
        slot = int(first) + t
        last = [s for s in range(slot + 1) if valid[b, s]][-window:]
        # A query that is padding itself is read by nobody.
        if valid[b, slot]:
            assert np.flatnonzero(found[b if padded else 0, t]).tolist() == last


@pytest.mark.parametrize("window", [None, 1, 3])
def test_what_is_seen_from_a_slot(window: int | None) -> None:
    found = np.asarray(masks.seen_from(jnp.array([0, 2, 5]), 6, window))
    for row, slot in zip(found, (0, 2, 5), strict=True):
        expected = Mask(first=slot, window=window).dense(1, 6)
        assert expected is not None and row.tolist() == expected[0, 0].tolist()


def test_the_docstring_example_of_running_positions() -> None:
    positions = masks.running_positions(jnp.array([[1, 0, 1, 1]], bool), first=5)
    assert positions.tolist() == [[5, 1, 6, 7]]
    assert masks.running_positions(jnp.array([[0, 1, 1, 0]], bool)).tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("first", [None, 0, 3, jnp.int32(3)])
@pytest.mark.parametrize("parts", ["nothing", "valid", "segments", "both"])
def test_a_mask_is_all_of_its_parts(first, parts: str) -> None:
    rng = np.random.default_rng(0)
    valid = rng.random((2, 7)) < 0.7 if parts in ("valid", "both") else None
    told = parts in ("segments", "both")
    queries, keys = (rng.integers(0, 3, (2, n)) if told else None for n in (4, 7))
    given = [None if a is None else jnp.asarray(a) for a in (valid, queries, keys)]
    found = Mask(first, *given).dense(4, 7)
    if first is None and parts == "nothing":
        assert found is None
        return
    assert found is not None
    for b, t, s in np.ndindex(2, 4, 7):
        seen = first is None or s <= int(first) + t
        seen &= valid is None or bool(valid[b, s])
        seen &= queries is None or keys is None or queries[b, t] == keys[b, s]
        assert bool(found[b if len(found) > 1 else 0, t, s]) == seen


def test_the_parts_that_are_data() -> None:
    assert Mask().arrays() == {} and Mask(first=3).arrays() == {}
    moving = jnp.int32(3)
    assert Mask(first=moving).arrays() == {"first": moving}
