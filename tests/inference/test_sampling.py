"""Sampling: what equals greedy, what depends on the seed, and whose distribution the draws have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.inference.sampling import MAX_STOP_IDS, Sampling, make_sampling, next_token
from tests import tiny

fast_compilation = tiny.fast_compilation

DRAWS = 4096
# Chi-square with at most 7 degrees of freedom exceeds 40 once in a million; the seeds are fixed.
LARGEST_CHI_SQUARE = 40.0

next_token_jit = jax.jit(next_token)


def logits(rows: int = 5, vocabulary: int = 64) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(7), (rows, vocabulary))


def draw(logits_BV, temperature=1.0, top_p=1.0, top_k=0, seed=0, step=0) -> np.ndarray:
    sampling = make_sampling(len(logits_BV), temperature, top_p, top_k, seed, ())
    return np.asarray(next_token_jit(logits_BV, sampling, jnp.int32(step)))


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.0),
        dict(temperature=0.0, top_p=0.5, top_k=7, seed=3),
        dict(top_k=1),
        dict(top_p=1e-9),
        dict(top_p=0.0),
        dict(temperature=1e-4),
    ],
    ids=str,
)
def test_what_equals_greedy(settings: dict) -> None:
    scores = logits()
    for step in range(3):
        assert draw(scores, **settings, step=step).tolist() == scores.argmax(-1).tolist()


def test_seeds_reproduce_and_differ() -> None:
    scores = logits(vocabulary=1000) / 10
    by_seed = {
        seed: [draw(scores, seed=seed, step=s).tolist() for s in range(4)] for seed in (1, 2)
    }
    assert by_seed[1] == [draw(scores, seed=1, step=s).tolist() for s in range(4)]
    assert by_seed[1] != by_seed[2]
    assert len(set(map(tuple, by_seed[1]))) == 4, "every step draws anew"


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    scores = logits() / 3
    sampling = Sampling(
        temperature_B=np.array([1.0, 0.0, 0.5, 2.0, 1.0], np.float32),
        top_p_B=np.array([1.0, 1.0, 0.9, 0.8, 1.0], np.float32),
        top_k_B=np.array([0, 0, 20, 0, 5], np.int32),
        seed_B=np.array([1, 2, 3, 4, 5], np.uint32),
        stop_ids_BE=np.full((5, MAX_STOP_IDS), -1, np.int32),
        min_tokens_B=np.zeros(5, np.int32),
        limit_B=np.full(5, 100, np.int32),
    )
    for step in range(3):
        together = next_token_jit(scores, sampling, jnp.int32(step))
        backwards = jax.tree.map(lambda a: a[::-1], sampling)
        other = next_token_jit(scores[::-1], backwards, jnp.int32(step))
        assert together.tolist() == other[::-1].tolist()
        for row in range(5):
            alone = jax.tree.map(lambda a, row=row: a[row : row + 1], sampling)
            found = next_token_jit(scores[row : row + 1], alone, jnp.int32(step))
            assert int(found[0]) == int(together[row])


def chi_square(drawn: np.ndarray, expected: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(expected))
    assert (counts[expected == 0] == 0).all(), "a token that was cut off was drawn"
    possible = expected > 0
    mean = len(drawn) * expected[possible]
    return float(((counts[possible] - mean) ** 2 / mean).sum())


PROBABILITIES = np.array([0.05, 0.3, 0.02, 0.25, 0.08, 0.15, 0.05, 0.1])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(), range(8)),
        (dict(temperature=0.7), range(8)),
        (dict(temperature=2.0), range(8)),
        (dict(top_k=3), [1, 3, 5]),
        # 0.3 + 0.25 is less than 0.6, so the third one is needed to reach it.
        (dict(top_p=0.6), [1, 3, 5]),
        (dict(top_p=0.5), [1, 3]),
        (dict(top_k=2, top_p=0.9), [1, 3]),
        # Of the three that top_k keeps, two have (0.3 + 0.25) / 0.7 = 0.79 of the mass.
        (dict(top_k=3, top_p=0.75), [1, 3]),
    ],
    ids=str,
)
def test_draws_have_the_distribution(settings: dict, kept) -> None:
    expected = np.zeros(8)
    expected[list(kept)] = PROBABILITIES[list(kept)] ** (1 / settings.get("temperature", 1.0))
    expected /= expected.sum()
    scores = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)) + 3.0
    sampling = make_sampling(DRAWS, 1.0, 1.0, 0, 0, ())
    given = {f"{name}_B": np.full(DRAWS, value, np.float32) for name, value in settings.items()}
    seeds = np.arange(DRAWS, dtype=np.uint32)
    sampling = dataclasses.replace(sampling, **given, seed_B=seeds)
    drawn = next_token_jit(jnp.tile(scores, (DRAWS, 1)), sampling, jnp.int32(0))
    assert chi_square(np.asarray(drawn), expected) < LARGEST_CHI_SQUARE


def test_the_steps_of_one_seed_have_the_distribution() -> None:
    scores = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
    sampling = make_sampling(1, 1.0, 1.0, 0, 11, ())
    steps = jnp.arange(DRAWS)
    drawn = jax.jit(jax.vmap(lambda step: next_token(scores, sampling, step)[0]))(steps)
    assert chi_square(np.asarray(drawn), PROBABILITIES) < LARGEST_CHI_SQUARE
    pairs = np.asarray(drawn)[:-1] * 8 + np.asarray(drawn)[1:]
    both = np.outer(PROBABILITIES, PROBABILITIES).ravel()
    # 63 degrees of freedom: more than 140 once in ten million.
    assert chi_square(pairs, both) < 140


def test_stop_ids_are_padded_to_one_shape() -> None:
    for ids in ((), (5,), (1, 2, 3)):
        sampling = Sampling.greedy(2, ids)
        assert sampling.stop_ids_BE[1].tolist() == [*ids, *[-1] * (MAX_STOP_IDS - len(ids))]
        assert sampling.temperature_B.tolist() == [0.0, 0.0]
