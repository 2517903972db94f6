"""Choosing the next token: greedy, temperature, top-k, top-p; each row by its own settings."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.params import Array, Leaf

MAX_STOP_IDS = 8
MOST_LIMIT = 2**30  # of tokens: no limit


@struct.dataclass
class Sampling:
    """Settings of every row as arrays, so that other settings compile nothing new."""

    temperature_B: Leaf  # 0: greedy
    top_p_B: Leaf  # 1: all tokens
    top_k_B: Leaf  # 0: all tokens
    seed_B: Leaf  # a row's own seed: its tokens do not depend on the rows beside it
    stop_ids_BE: Leaf  # token ids that end an answer; -1 stands for none
    min_tokens_B: Leaf  # before these, no token of `stop_ids_BE` is drawn
    limit_B: Leaf  # tokens of the answer, at most

    @classmethod
    def greedy(cls, rows: int, stop_ids: tuple[int, ...]) -> "Sampling":
        return make_sampling(rows, 0.0, 1.0, 0, 0, stop_ids)


def make_sampling(
    rows: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | Sequence[int],
    stop_ids: tuple[int, ...],
) -> Sampling:
    """The same settings for every row, and one seed for all of them or one for each."""
    return Sampling(
        temperature_B=np.full(rows, temperature, np.float32),
        top_p_B=np.full(rows, top_p, np.float32),
        top_k_B=np.full(rows, top_k, np.int32),
        seed_B=np.broadcast_to(np.asarray(seed, np.uint32), rows).copy(),
        stop_ids_BE=np.tile(padded_stops(stop_ids), (rows, 1)),
        min_tokens_B=np.zeros(rows, np.int32),
        limit_B=np.full(rows, MOST_LIMIT, np.int32),
    )


def padded_stops(stop_ids: Sequence[int]) -> np.ndarray:
    """int32 [MAX_STOP_IDS]: always as many, so that other ends compile nothing.

    Any beyond them the host finds (answer.py).
    """
    return np.array((*stop_ids, *(-1,) * MAX_STOP_IDS)[:MAX_STOP_IDS], np.int32)


def row_seed(seed: int, row: int) -> int:
    """The seed that a list's row draws with: the first one's is `seed`, as it would be alone.

    So the answers to one prompt given n times differ, and each is a function of seed and row.
    """
    return seed if row == 0 else int(np.random.SeedSequence((seed, row)).generate_state(1)[0])


def next_token(logits_BV: Array, sampling: Sampling, step: Array) -> Array:
    """Token ids [B] drawn from float32 logits.

    `step` counts the tokens of the answer so far: one number, or one for each row.
    """
    logits_BV = sharding.constrain(logits_BV, ("batch", None))  # a sort needs the whole vocabulary
    # The host gives every device all rows' settings; vmap wants them split as the logits are.
    settings = (sampling.temperature_B, sampling.top_p_B, sampling.top_k_B, sampling.seed_B)
    temperature_B, top_p_B, top_k_B, seed_B, least_B, step_B = (
        sharding.constrain(jnp.broadcast_to(jnp.asarray(each), logits_BV.shape[:1]), ("batch",))
        for each in (*settings, sampling.min_tokens_B, step)
    )
    early_B = step_B < least_B
    logits_BV = jax.lax.cond(
        early_B.any(), lambda x: _without_ends(x, early_B, sampling), lambda x: x, logits_BV
    )
    greedy_B = logits_BV.argmax(-1).astype(jnp.int32)

    def draw() -> Array:
        keys_B = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
            seed_B, step_B
        )
        drawn_B = jax.vmap(_draw)(logits_BV, temperature_B, top_p_B, top_k_B, keys_B)
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    # Sorting a vocabulary costs as much as the rest of a step: only where some row samples.
    return jax.lax.cond((temperature_B > 0).any(), draw, lambda: greedy_B)


def _without_ends(logits_BV: Array, early_B: Array, sampling: Sampling) -> Array:
    """The logits with those of every row's `stop_ids_BE` at -inf where `early_B` says so."""
    ids_V = jnp.arange(logits_BV.shape[1])
    # One after the other: all at once would be [B, E, V].
    for stop_B in _stops(sampling).T:
        is_stop_BV = (ids_V == stop_B[:, None]) & early_B[:, None]
        logits_BV = jnp.where(is_stop_BV, -jnp.inf, logits_BV)
    return logits_BV


def is_end(token_B: Array, sampling: Sampling) -> Array:
    """Which rows' token is one of their `stop_ids_BE`."""
    token_B = sharding.constrain(token_B, ("batch",))
    return (token_B[:, None] == _stops(sampling)).any(axis=1)


def _stops(sampling: Sampling) -> Array:
    return sharding.constrain(jnp.asarray(sampling.stop_ids_BE), ("batch", None))


def _draw(logits_V: Array, temperature: Array, top_p: Array, top_k: Array, key: Array) -> Array:
    """One token: temperature first, then the k likeliest, then the smallest set of mass p."""
    order_V = jnp.argsort(-logits_V)
    # Greedy rows of the batch come here, too; what is drawn for them is not used.
    sorted_V = logits_V[order_V] / jnp.maximum(temperature, 1e-6)
    rank_V = jnp.arange(len(sorted_V))
    kept_V = (top_k <= 0) | (rank_V < top_k)
    weights_V = jax.nn.softmax(jnp.where(kept_V, sorted_V, -jnp.inf))
    # A token is kept while the mass before it is below p: the first one always is.
    kept_V &= (jnp.cumsum(weights_V) - weights_V) < top_p
    chosen = jax.random.categorical(key, jnp.where(kept_V, sorted_V, -jnp.inf))
    return order_V[chosen].astype(jnp.int32)
