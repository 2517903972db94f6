"""Slots: rows of one KV cache, each with a request of its own, and the programs that work on them.

    prompts --reading.py--> slots --.
    a row that has outgrown its ----|--decode, all slots at once--> tokens
    lane --move---------------------'

A lane is a number of slots of one length. Rows differ in position, settings and end by arrays, so
no request compiles anything. The token of a row that was drawn last is not in its cache yet:
decoding writes it, and draws the next.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.inference.answer import MOST_TOP
from llava_mini_jax.inference.sampling import Sampling, is_end, next_token
from llava_mini_jax.models import cache, llama
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.masks import Mask, seen_from
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.params import Array


@struct.dataclass
class Lane:
    """The state of B slots of S places each."""

    keys: tuple[Array, ...]  # of every layer [B, K, S, H]
    values: tuple[Array, ...]
    token_B: Array  # int32: drawn, not in the cache yet
    used_B: Array  # int32: positions of the row so far
    count_B: Array  # int32: tokens of the answer, `token_B` included
    going_B: Array  # bool: more tokens are to come
    # int32: of these, those that have left the cache, in the layers where a compressor's images
    # do (`Declaration.keeps`): later ones have moved forward. None for all others.
    dropped_B: Array | None = None


@struct.dataclass
class Told:
    """Tokens that a call has drawn, up to N of each row."""

    tokens_BN: Array  # int32, -1 where there is none
    logprobs_BN: Array  # float32, natural; 0 where nobody asks
    top_ids_BNJ: Array  # int32, the likeliest tokens; J is MOST_TOP
    top_logprobs_BNJ: Array
    going_B: Array  # bool: more are to come


# One program: each array's zeros would be compiled for.
@partial(jax.jit, static_argnames=("slots", "length", "cfg"))
def empty(slots: int, length: int, cfg: LlavaMiniConfig) -> Lane:
    """A lane that holds nothing."""
    llm = cfg.llm
    # Rows lie whole on every device of the batch axes: programs write single ones.
    axes = (None, "heads", None, None)

    def array(places: int) -> Array:
        shape = (slots, llm.kv_heads, places, llm.head_width)
        return jnp.zeros(shape, cfg.dtype, out_sharding=sharding.partition(shape, axes))

    def arrays() -> tuple[Array, ...]:
        return tuple(map(array, cache.lengths(cfg, length)))

    def numbers() -> Array:
        return jnp.zeros(slots, jnp.int32, out_sharding=sharding.partition((slots,), (None,)))

    return Lane(
        keys=arrays(),
        values=arrays(),
        token_B=numbers(),
        used_B=numbers(),
        count_B=numbers(),
        going_B=numbers() > 0,
        dropped_B=numbers() if cfg.declared.keeps else None,
    )


# Donated, as in all programs here: a cache that came back as a copy would be held twice.
@partial(jax.jit, static_argnames=("cfg", "most"), donate_argnames="lane")
def decode(
    params: LlavaMini,
    lane: Lane,
    sampling: Sampling,
    alive_B: Array,
    told_B: Array,
    steps: Array,
    ends: Array,
    cfg: LlavaMiniConfig,
    most: int,
) -> tuple[Lane, Told]:
    """Up to `steps` tokens (`most` at most) for every row that is going.

    `alive_B` says which rows the host still wants, `told_B` whose log probabilities. The call
    returns as soon as `ends` rows have ended, so that others may take their slots.
    """
    lane = dataclasses.replace(lane, going_B=lane.going_B & alive_B)
    before_B = lane.going_B

    def unfinished(carry: tuple[Lane, Told, Array]) -> Array:
        lane, _, step = carry
        ended = (before_B & ~lane.going_B).sum()
        return (step < steps) & lane.going_B.any() & (ended < ends)

    def one(carry: tuple[Lane, Told, Array]) -> tuple[Lane, Told, Array]:
        lane, told, step = carry
        going_B = lane.going_B
        lane, logits_BV = next_logits(params, lane, cfg)
        token_B = everywhere(next_token(logits_BV, sampling, lane.count_B))
        told = tell(told, step, token_B, logits_BV, going_B, going_B & told_B)
        return _drawn(lane, token_B, going_B, sampling), told, step + 1

    told = untold(len(alive_B), most)
    lane, told, _ = jax.lax.while_loop(unfinished, one, (lane, told, jnp.int32(0)))
    return lane, dataclasses.replace(told, going_B=lane.going_B)


def next_logits(params: LlavaMini, lane: Lane, cfg: LlavaMiniConfig) -> tuple[Lane, Array]:
    """The lane with every row's token in its cache, and the logits [B, V] behind it.

    How many places a row holds is left as it was: one that is not going writes behind them, where
    nobody reads.
    """
    used_B = lane.used_B
    place_LB, attends_L = _places(lane, cfg)
    # Plain embeddings, never fused: so the release generates, too.
    x_B1D = llama.embed(params.llm, lane.token_B[:, None], cfg.dtype)

    def remember(layer: int, k_BK1H: Array, v_BK1H: Array):
        k_BKSH = _put_rows(lane.keys[layer], k_BK1H, place_LB[layer])
        v_BKSH = _put_rows(lane.values[layer], v_BK1H, place_LB[layer])
        return _by_batch(k_BKSH), _by_batch(v_BKSH), (k_BKSH, v_BKSH)

    x_B1D, memories = llama.run_remembering(
        params.llm.layers, x_B1D, used_B[:, None], attends_L, remember, cfg.llm
    )
    keys, values = zip(*memories, strict=True)
    return dataclasses.replace(lane, keys=keys, values=values), logits(params, x_B1D, cfg)


def _places(lane: Lane, cfg: LlavaMiniConfig) -> tuple[list[Array], list[Callable]]:
    """(place of the next token [B], what its query attends to) of each layer."""

    def of(layer: int, place_B: Array) -> tuple[Array, Callable]:
        seen_BS = seen_from(place_B, lane.keys[layer].shape[2], cfg.llm.window)
        return place_B, attend(Mask(valid_BS=seen_BS), cfg.attention)

    layers, keeps = cfg.llm.layers, cfg.declared.keeps
    if lane.dropped_B is None or keeps is None:
        found = [of(0, lane.used_B)] * layers
    else:
        # The same in all that lie alike.
        whole = [of(0, lane.used_B)] * keeps[0]
        found = [*whole, *[of(keeps[0], lane.used_B - lane.dropped_B)] * (layers - keeps[0])]
    place_LB, attends_L = zip(*found, strict=True)
    return list(place_LB), list(attends_L)


def _put_rows(kept_BKSH: Array, new_BK1H: Array, place_B: Array) -> Array:
    """Keys or values with each row's new one in a place of its own."""
    new_BK1H = whole_rows(new_BK1H)
    if len(kept_BKSH) == 1 or sharding.on_mesh():
        # One after the other: in place, and no scatter over what a mesh has cut.
        for row in range(len(kept_BKSH)):
            new_1K1H, at = new_BK1H[row : row + 1], (row, 0, place_B[row], 0)
            kept_BKSH = jax.lax.dynamic_update_slice(kept_BKSH, new_1K1H, at)
        return kept_BKSH
    put = jax.vmap(lambda kept, new, at: jax.lax.dynamic_update_slice(kept, new, (0, at, 0)))
    return put(kept_BKSH, new_BK1H, place_B)


def whole_rows(x_BKSH: Array) -> Array:
    return sharding.constrain(x_BKSH, (None, "heads", None, None))


def _by_batch(x_BKSH: Array) -> Array:
    """As queries lie that attend to it."""
    return sharding.constrain(x_BKSH, ("batch", "heads", None, None))


def everywhere(x: Array) -> Array:
    return sharding.constrain(x, (None,) * x.ndim)


def logits(params: LlavaMini, x_B1D: Array, cfg: LlavaMiniConfig) -> Array:
    x_B1D = rms_norm(x_B1D, params.llm.final_norm, cfg.llm.norm_eps)
    return everywhere(llama.logits(params.llm, x_B1D)[:, 0])


def ends(token_B: Array, sampling: Sampling) -> Array:
    return everywhere(is_end(token_B, sampling))


def _drawn(lane: Lane, token_B: Array, going_B: Array, sampling: Sampling) -> Lane:
    """The lane behind a step: the old tokens are in the cache, the new ones are not yet."""
    more = going_B.astype(jnp.int32)
    count_B = lane.count_B + more
    ended_B = ends(token_B, sampling) | (count_B >= jnp.asarray(sampling.limit_B))
    return dataclasses.replace(
        lane,
        token_B=jnp.where(going_B, token_B, lane.token_B),
        used_B=lane.used_B + more,
        count_B=count_B,
        going_B=going_B & ~ended_B,
    )


def untold(rows: int, most: int) -> Told:
    return Told(
        tokens_BN=jnp.full((rows, most), -1, jnp.int32),
        logprobs_BN=jnp.zeros((rows, most)),
        top_ids_BNJ=jnp.zeros((rows, most, MOST_TOP), jnp.int32),
        top_logprobs_BNJ=jnp.zeros((rows, most, MOST_TOP)),
        going_B=jnp.zeros(rows, bool),
    )


def tell(
    told: Told, step: Array, token_B: Array, logits_BV: Array, going_B: Array, asked_B: Array
) -> Told:
    def put(kept: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new[:, None], step, axis=1)

    told = dataclasses.replace(told, tokens_BN=put(told.tokens_BN, jnp.where(going_B, token_B, -1)))

    def with_logprobs(told: Told) -> Told:
        # Of the model's own distribution: neither temperature nor top-p is in them.
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        top_BJ, ids_BJ = jax.lax.top_k(logprobs_BV, min(MOST_TOP, logits_BV.shape[1]))
        missing = MOST_TOP - top_BJ.shape[1]
        top_BJ = jnp.pad(top_BJ, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        own_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
        return dataclasses.replace(
            told,
            logprobs_BN=put(told.logprobs_BN, own_B),
            top_ids_BNJ=put(told.top_ids_BNJ, jnp.pad(ids_BJ, ((0, 0), (0, missing)))),
            top_logprobs_BNJ=put(told.top_logprobs_BNJ, top_BJ),
        )

    return jax.lax.cond(asked_B.any(), with_logprobs, lambda told: told, told)


@partial(jax.jit, donate_argnames="to")
def move(lane: Lane, to: Lane, slot: Array, to_slot: Array) -> Lane:
    """The lane `to` with a row of a shorter one in one of its slots, going on where it stood."""

    def moved(all_BKSH: Array, old_BKSH: Array) -> Array:
        row_1KSH = jax.lax.dynamic_slice_in_dim(old_BKSH, slot, 1)
        return jax.lax.dynamic_update_slice(all_BKSH, row_1KSH, (to_slot, 0, 0, 0))

    return Lane(
        keys=tuple(map(moved, to.keys, lane.keys)),
        values=tuple(map(moved, to.values, lane.values)),
        token_B=to.token_B.at[to_slot].set(lane.token_B[slot]),
        used_B=to.used_B.at[to_slot].set(lane.used_B[slot]),
        count_B=to.count_B.at[to_slot].set(lane.count_B[slot]),
        going_B=to.going_B.at[to_slot].set(True),
        dropped_B=_one_more(to.dropped_B, to_slot, lane.dropped_B, slot),
    )


def _one_more(
    all_B: Array | None, to_slot: Array, old_B: Array | None, slot: Array
) -> Array | None:
    return None if all_B is None or old_B is None else all_B.at[to_slot].set(old_B[slot])
