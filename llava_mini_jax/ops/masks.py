"""Attention masks, as the parts they are made of; and position ids that skip what is masked."""

import dataclasses

import jax
import jax.numpy as jnp

from llava_mini_jax.params import Array


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may attend to whom. Kernels take the parts, and skip blocks that nobody sees.

    A query sees the keys in its own slot and before it that are valid and of its segment. Slots are
    places in the key sequence, so one rule serves a whole sequence, a block of a long prefill, one
    decoding step and pre-fusion; padding inside the sequence only has to be marked invalid.

        Mask(first=2, valid_BS=[[1, 1, 0, 1, 1]]) =
            query 0, in slot 2:  1 1 0 0 0
            query 1, in slot 3:  1 1 0 1 0

    Padding behind the last valid query needs no `valid_BS`: its slots are behind every reader.

    With a `window` (Mistral's `sliding_window`) a query sees the last so many valid keys only, the
    one in its own slot included. Keys that hold nothing are not counted, so that a row means the
    same with padding and without:

        Mask(first=2, valid_BS=[[1, 1, 0, 1, 1]], window=2) =
            query 0, in slot 2:  1 1 0 0 0
            query 1, in slot 3:  0 1 0 1 0

    With `until_BS` a key is seen by queries up to that slot only (VoCo: patches are, by what comes
    before their image's last token):

        Mask(first=2, until_BS=[[9, 2, 2, 9, 9]]) =
            query 0, in slot 2:  1 1 1 0 0
            query 1, in slot 3:  1 0 0 1 0
    """

    first: int | Array | None = None  # slot of query 0; None: queries see keys in all slots
    valid_BS: Array | None = None  # bool: keys that hold something; None: all of them
    # int32: sequences packed into one row, by number. Both or neither.
    query_segments_BT: Array | None = None
    key_segments_BS: Array | None = None
    window: int | None = None  # how many keys a query sees; None: all
    until_BS: Array | None = None  # int32: the last slot whose query sees a key; None: any does

    def arrays(self) -> dict[str, Array]:
        """The parts that are data, by name: not those left out, nor a `first` known to the host."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v for k, v in parts.items() if v is not None and not isinstance(v, int)}

    def dense(self, queries: int, keys: int) -> Array | None:
        """The whole mask, bool [B or 1, T, S]; None where everybody sees everything."""
        allowed = []
        if self.first is not None:
            slots_T = self.first + jnp.arange(queries)
            allowed.append((jnp.arange(keys) <= slots_T[:, None])[None])
        if self.valid_BS is not None:
            allowed.append(self.valid_BS[:, None, :])
        if self.until_BS is not None:
            assert self.first is not None, "only queries that have slots come before another"
            slots_T = self.first + jnp.arange(queries)
            allowed.append(slots_T[None, :, None] <= self.until_BS[:, None, :])
        if self.query_segments_BT is not None:
            assert self.key_segments_BS is not None
            allowed.append(self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :])
        if self.window is not None:
            allowed.append(self._near(queries, keys, self.window))
        if not allowed:
            return None
        mask_BTS = allowed[0]
        for more in allowed[1:]:
            mask_BTS = mask_BTS & more
        return jnp.broadcast_to(mask_BTS, (mask_BTS.shape[0], queries, keys))

    def _near(self, queries: int, keys: int, window: int) -> Array:
        """Who is among the last `window` valid keys of whom, or behind it: bool [B or 1, T, S]."""
        assert self.first is not None, "a window belongs to queries that have slots"
        valid_BS = jnp.ones((1, keys), bool) if self.valid_BS is None else self.valid_BS
        counted_BS = jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32)
        counted_BT = jnp.take(counted_BS, self.first + jnp.arange(queries), axis=1, mode="clip")
        return counted_BT[:, :, None] - counted_BS[:, None, :] < window


def causal(valid_BS: Array, window: int | None = None) -> Array:
    """The whole mask [B, S, S] of sequences whose every valid position is a query too."""
    mask = Mask(first=0, valid_BS=valid_BS, window=window)
    mask_BSS = mask.dense(valid_BS.shape[1], valid_BS.shape[1])
    assert mask_BSS is not None
    return mask_BSS


def seen_from(slot_B: Array, slots: int, window: int | None) -> Array:
    """bool [B, S]: the slots that a query in slot `slot_B` of its row sees, all of them filled.

    seen_from([2], 5, window=2) = [[0, 1, 1, 0, 0]]
    """
    seen_BS = jnp.arange(slots) <= slot_B[:, None]
    if window is None:
        return seen_BS
    return seen_BS & (jnp.arange(slots) > slot_B[:, None] - window)


def running_positions(valid_BT: Array, first: int | Array = 0) -> Array:
    """Position ids that count valid entries only, from `first`; invalid entries get 1.

    The 1 has no effect (an invalid entry is seen by none); it is what the release computes
    (docs/release.md, "Masks"), so that every intermediate array can be compared with it.

        running_positions([[1, 0, 1, 1]], first=5) = [[5, 1, 6, 7]]
    """
    counted = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1 + first
    return jnp.where(valid_BT, counted, 1)


def restarted(positions_BS: Array, segments_BS: Array) -> Array:
    """Positions that begin at 0 with each conversation, of positions that run through the row.

    restarted([[0, 1, 2, 3]], segments=[[0, 0, 1, 1]]) = [[0, 1, 0, 1]]
    """
    begins_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1] - 1) != 0
    first_BS = jax.lax.cummax(jnp.where(begins_BS, positions_BS, 0), axis=1)
    return positions_BS - first_BS
