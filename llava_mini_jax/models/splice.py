"""Splice: text and visual tokens of each row put into one sequence for the language model.

The host plans (`plan_slots`), the device gathers (`splice`). A slot says what stands at an output
position of a row:

    ids     a  b  IMAGE  c  d            one image of Q = 2 tokens, T = 5
    slots   0  1   5  6  3  4  -1        < T: that text position;  T + v: the row's visual token v;
                                         -1: padding
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.params import Array

PADDING = -1


def plan_row(is_mark: Iterable[bool], tokens_per_mark: Sequence[int], text: int) -> np.ndarray:
    """Slots of one row, without padding.

    `is_mark` says which of the row's text positions are image marks, `tokens_per_mark` how many
    visual tokens (images * Q, or frames * Q) replace each; visual tokens beyond the marks are left
    out (a row without a mark). `text` is T, the padded text length of the batch.
    """
    slots: list[int] = []
    used = marks = 0
    for position, mark in enumerate(is_mark):
        if mark:
            if marks >= len(tokens_per_mark):
                raise ValueError(f"more image marks than the {len(tokens_per_mark)} visual inputs")
            # Visual tokens are numbered behind all text: `splice` puts the two end to end.
            slots.extend(range(text + used, text + used + tokens_per_mark[marks]))
            used += tokens_per_mark[marks]
            marks += 1
        else:
            slots.append(position)
    return np.asarray(slots, np.int32)


def pad_slots(rows: Sequence[np.ndarray], length: int, side: str = "right") -> np.ndarray:
    """Rows as one array [B, length], padded with -1 at the right, or at the left."""
    out = np.full((len(rows), length), PADDING, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} positions, more than {length}")
        if side == "right":
            out[i, : len(row)] = row
        else:
            out[i, length - len(row) :] = row
    return out


def splice(text_BTD: Array, visual_BVD: Array, slots_BS: Array) -> Array:
    """inputs [B, S, D] of the language model; zeros where a slot is padding."""
    with jax.named_scope("splice"):
        source_BUD = jnp.concatenate([text_BTD, visual_BVD.astype(text_BTD.dtype)], axis=1)
        # Padding's -1 would read the last entry; whatever it reads is zeroed below.
        index_BS = jnp.maximum(slots_BS, 0)
        inputs_BSD = jnp.take_along_axis(source_BUD, index_BS[..., None], axis=1)
        return jnp.where((slots_BS >= 0)[..., None], inputs_BSD, 0)


def splice_valid(ids_BT: Array, valid_BV: Array, slots_BS: Array) -> Array:
    """Which positions [B, S] hold something: all text, and of the visual tokens those of `valid`.

    Attention sees the others as it sees padding, and positions are counted without them.
    """
    whole_BW = jnp.concatenate([jnp.ones_like(ids_BT, bool), valid_BV], axis=1)
    found_BS = jnp.take_along_axis(whole_BW, jnp.maximum(slots_BS, 0), axis=1)
    return found_BS & (slots_BS >= 0)


def repeat_last(x_BSD: Array, valid_BS: Array) -> Array:
    """Each position's vector, or of one that holds nothing that of the last before it that does."""
    places_BS = jnp.where(valid_BS, jnp.arange(valid_BS.shape[1]), 0)
    last_BS = jax.lax.cummax(places_BS, axis=1)
    return jnp.take_along_axis(x_BSD, last_BS[..., None], axis=1)
