"""Masks and position ids: the worked examples of their docstrings, and a slow definition."""

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.ops import masks


def test_the_docstring_example_of_causal() -> None:
    mask = masks.causal(jnp.array([2, 3]), jnp.array([[1, 1, 0, 1, 1]], bool))
    assert mask.dtype == bool
    assert mask.astype(int).tolist() == [[[1, 1, 0, 0, 0], [1, 1, 0, 1, 0]]]


def test_the_docstring_example_of_running_positions() -> None:
    positions = masks.running_positions(jnp.array([[1, 0, 1, 1]], bool), first=5)
    assert positions.tolist() == [[5, 1, 6, 7]]
    assert masks.running_positions(jnp.array([[0, 1, 1, 0]], bool)).tolist() == [[1, 0, 1, 1]]


def test_causal_is_own_slot_and_before_where_valid() -> None:
    valid = np.random.default_rng(0).random((3, 7)) < 0.7
    slots = np.array([4, 5, 6])
    mask = np.asarray(masks.causal(jnp.asarray(slots), jnp.asarray(valid)))
    assert mask.shape == (3, 3, 7)
    for b, t, s in np.ndindex(*mask.shape):
        assert mask[b, t, s] == (s <= slots[t] and valid[b, s])
