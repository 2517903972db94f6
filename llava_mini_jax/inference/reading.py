"""The programs that read prompts into slots (slots.py).

prompts, or their beginnings --read_fresh, a few at a time--> slots, first tokens
one more block of a long prompt --read_block----------------> its slot, its first token
an image of which little stays in the cache --read_piece----> the same
a prompt whose later layers keep a choice ------read_chosen---> the same
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_mini_jax.inference import slots
from llava_mini_jax.inference.sampling import Sampling, next_token
from llava_mini_jax.models import compressors, llama
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import Array, Leaf


class Piece(NamedTuple):
    """Where `read_piece` reads, and what of it stays; int32 numbers."""

    position: Leaf  # of its first, as the language model counts them
    place: Leaf  # in the slot, behind what that holds
    count: Leaf
    kept: Leaf  # the last ones


@partial(jax.jit, static_argnames="cfg", donate_argnames="lane")
def read_fresh(
    params: LlavaMini,
    lane: slots.Lane,
    x: tuple[Array, ...],
    count_R: Array,
    slot_R: Array,
    final_R: Array,
    sampling: Sampling,
    told_B: Array,
    cfg: LlavaMiniConfig,
) -> tuple[slots.Lane, slots.Told]:
    """R prompts, or their beginnings, read into slots: rows x of [S, D], `count_R` places of each.

    Where `final_R` says that this is the whole prompt the first token is drawn. A row that is given
    twice, because fewer than R are there, is written twice. `sampling` is of all slots.
    """
    lane, logits_RV = fresh_logits(params, lane, x, count_R, slot_R, cfg)
    return begun(lane, logits_RV, count_R, slot_R, final_R, sampling, told_B)


def fresh_logits(
    params: LlavaMini,
    lane: slots.Lane,
    x: tuple[Array, ...],
    count_R: Array,
    slot_R: Array,
    cfg: LlavaMiniConfig,
) -> tuple[slots.Lane, Array]:
    """The lane with R prompts in its slots, as `read_fresh` is given them, and the logits [R, V]
    behind each; how many places a row holds is left as it was."""
    x_RSD = jnp.stack(x)
    R, S = x_RSD.shape[:2]
    kept: dict[str, list[Array]] = {"keys": [], "values": []}

    def remember(layer: int, k_RKSH: Array, v_RKSH: Array):
        for name, new in (("keys", k_RKSH), ("values", v_RKSH)):
            all_BKSH, new = getattr(lane, name)[layer], slots.whole_rows(new)
            for row in range(R):
                at = (slot_R[row], 0, 0, 0)
                all_BKSH = jax.lax.dynamic_update_slice(all_BKSH, new[row : row + 1], at)
            kept[name].append(all_BKSH)
        return k_RKSH, v_RKSH, None

    # Padding stands behind every reader, and is written over by what comes next.
    positions_RS = jnp.broadcast_to(jnp.arange(S), (R, S))
    attends = attend(Mask(first=0, window=cfg.llm.window), cfg.attention)
    x_RSD, _ = llama.run_remembering(
        params.llm.layers, x_RSD, positions_RS, attends, remember, cfg.llm
    )
    lane = dataclasses.replace(lane, keys=tuple(kept["keys"]), values=tuple(kept["values"]))
    last_R1D = jnp.take_along_axis(slots.everywhere(x_RSD), (count_R - 1)[:, None, None], axis=1)
    return lane, slots.logits(params, last_R1D, cfg)


@partial(jax.jit, static_argnames="cfg", donate_argnames="lane")
def read_block(
    params: LlavaMini,
    lane: slots.Lane,
    x_SD: Array,
    first: Array,
    count: Array,
    slot: Array,
    final: Array,
    sampling: Sampling,
    told_B: Array,
    cfg: LlavaMiniConfig,
) -> tuple[slots.Lane, slots.Told]:
    """`count` places of one prompt, from place `first` on, read behind what its slot holds."""
    kept: dict[str, list[Array]] = {"keys": [], "values": []}

    def remember(layer: int, k_1KTH: Array, v_1KTH: Array):
        own = []
        for name, new in (("keys", k_1KTH), ("values", v_1KTH)):
            all_BKSH = getattr(lane, name)[layer]
            at = (slot, 0, first, 0)
            all_BKSH = jax.lax.dynamic_update_slice(all_BKSH, slots.whole_rows(new), at)
            kept[name].append(all_BKSH)
            own.append(jax.lax.dynamic_slice_in_dim(all_BKSH, slot, 1))
        return own[0], own[1], None

    positions_1S = (first + jnp.arange(len(x_SD)))[None]
    attends = attend(Mask(first=first, window=cfg.llm.window), cfg.attention)
    x_1SD, _ = llama.run_remembering(
        params.llm.layers, x_SD[None], positions_1S, attends, remember, cfg.llm
    )
    lane = dataclasses.replace(lane, keys=tuple(kept["keys"]), values=tuple(kept["values"]))
    last_11D = jax.lax.dynamic_slice_in_dim(x_1SD, count - 1, 1, axis=1)
    one = (first + count)[None], slot[None], final[None]
    return begun(lane, slots.logits(params, last_11D, cfg), *one, sampling, told_B)


@partial(jax.jit, static_argnames="cfg", donate_argnames="lane")
def read_piece(
    params: LlavaMini,
    lane: slots.Lane,
    x_SD: Array,
    numbers: Piece,
    slot: Array,
    final: Array,
    sampling: Sampling,
    told_B: Array,
    cfg: LlavaMiniConfig,
) -> tuple[slots.Lane, slots.Told]:
    """`count` positions of one prompt behind what its slot holds, of which the last `kept` stay."""
    position, place, count, kept = numbers
    places, T = lane.keys[0].shape[2], len(x_SD)
    stays_S = (jnp.arange(places) >= place) & (jnp.arange(places) < place + kept)
    found: dict[str, list[Array]] = {"keys": [], "values": []}

    def remember(layer: int, k_1KTH: Array, v_1KTH: Array):
        seen = []
        for name, new in (("keys", k_1KTH), ("values", v_1KTH)):
            all_BKSH, new = getattr(lane, name)[layer], slots.whole_rows(new)
            own_1KSH = jax.lax.dynamic_slice_in_dim(all_BKSH, slot, 1)
            seen.append(jnp.concatenate([own_1KSH, new], axis=2))
            # The last ones of the piece, moved to their places; room on both sides for the others.
            wide = jnp.pad(new, ((0, 0), (0, 0), (places, places), (0, 0)))
            first = places + count - kept - place
            moved_1KSH = jax.lax.dynamic_slice_in_dim(wide, first, places, axis=2)
            own_1KSH = jnp.where(stays_S[:, None], moved_1KSH, own_1KSH)
            all_BKSH = jax.lax.dynamic_update_slice(all_BKSH, own_1KSH, (slot, 0, 0, 0))
            found[name].append(all_BKSH)
        return *seen, None

    positions_1T = (position + jnp.arange(T))[None]
    valid_S = jnp.concatenate([jnp.arange(places) < place, jnp.ones(T, bool)])
    attends = attend(Mask(first=places, valid_BS=valid_S[None]), cfg.attention)
    x_1TD, _ = llama.run_remembering(
        params.llm.layers, x_SD[None], positions_1T, attends, remember, cfg.llm
    )
    lane = dataclasses.replace(lane, keys=tuple(found["keys"]), values=tuple(found["values"]))
    last_11D = jax.lax.dynamic_slice_in_dim(x_1TD, count - 1, 1, axis=1)
    used = position + count
    lane = _dropped(lane, slot, used - place - kept)
    one = used[None], slot[None], final[None]
    return begun(lane, slots.logits(params, last_11D, cfg), *one, sampling, told_B)


@partial(jax.jit, static_argnames=("cfg", "stay"), donate_argnames="lane")
def read_chosen(
    params: LlavaMini,
    lane: slots.Lane,
    x_SD: Array,
    place_S: Array,
    count: Array,
    slot: Array,
    sampling: Sampling,
    told_B: Array,
    cfg: LlavaMiniConfig,
    stay: int,
) -> tuple[slots.Lane, slots.Told]:
    """A whole prompt of `count` positions, of which later layers keep `stay` at most.

    `place_S` says which of its image's tokens each position is, -1 where it is text.
    """
    visual_1S = place_S[None] >= 0
    placed = compressors.Placed(
        valid_BS=(jnp.arange(len(x_SD)) < count)[None],
        visual_BS=visual_1S,
        place_BS=place_S[None],
        patches=cfg.patches_per_image(1),
    )
    how = compressors.How(cfg.llm, "none", cfg.attention)
    x_1RD, kept_1, memories = compressors.read(
        params.llm, x_SD[None], placed, stay, cfg.compressor, how
    )

    def put(all_BKSH: Array, new_1KSH: Array) -> Array:
        return jax.lax.dynamic_update_slice(all_BKSH, slots.whole_rows(new_1KSH), (slot, 0, 0, 0))

    keys, values = zip(*memories, strict=True)
    lane = dataclasses.replace(
        lane, keys=tuple(map(put, lane.keys, keys)), values=tuple(map(put, lane.values, values))
    )
    lane = _dropped(lane, slot, count - kept_1[0])
    last_11D = jax.lax.dynamic_slice_in_dim(x_1RD, kept_1[0] - 1, 1, axis=1)
    one = count[None], slot[None], jnp.ones(1, bool)
    return begun(lane, slots.logits(params, last_11D, cfg), *one, sampling, told_B)


def _dropped(lane: slots.Lane, slot: Array, dropped: Array) -> slots.Lane:
    assert lane.dropped_B is not None
    return dataclasses.replace(lane, dropped_B=lane.dropped_B.at[slot].set(dropped))


def begun(
    lane: slots.Lane,
    logits_RV: Array,
    used_R: Array,
    slot_R: Array,
    final_R: Array,
    sampling: Sampling,
    told_B: Array,
) -> tuple[slots.Lane, slots.Told]:
    """The lane with R slots that have `used_R` positions, and the first tokens of those read
    whole."""
    own = jax.tree.map(lambda setting: jnp.asarray(setting)[slot_R], sampling)
    token_R = slots.everywhere(next_token(logits_RV, own, jnp.zeros_like(used_R)))
    asked_R = final_R & jnp.asarray(told_B)[slot_R]
    told = slots.tell(
        slots.untold(len(slot_R), 1), jnp.int32(0), token_R, logits_RV, final_R, asked_R
    )
    going_R = final_R & ~slots.ends(token_R, own) & (own.limit_B > 1)
    lane = dataclasses.replace(
        lane,
        token_B=lane.token_B.at[slot_R].set(token_R),
        used_B=lane.used_B.at[slot_R].set(used_R),
        count_B=lane.count_B.at[slot_R].set(final_R.astype(jnp.int32)),
        going_B=lane.going_B.at[slot_R].set(going_R),
    )
    return lane, dataclasses.replace(told, going_B=going_R)
