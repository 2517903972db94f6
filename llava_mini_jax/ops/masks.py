"""Attention masks, as the parts they are made of; and position ids that skip what is masked."""

import dataclasses

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
    """

    first: int | Array | None = None  # slot of query 0; None: queries see keys in all slots
    valid_BS: Array | None = None  # bool: keys that hold something; None: all of them
    # int32: sequences packed into one row, by number. Both or neither.
    query_segments_BT: Array | None = None
    key_segments_BS: Array | None = None

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
        if self.query_segments_BT is not None:
            assert self.key_segments_BS is not None
            allowed.append(self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :])
        if not allowed:
            return None
        mask_BTS = allowed[0]
        for more in allowed[1:]:
            mask_BTS = mask_BTS & more
        return jnp.broadcast_to(mask_BTS, (mask_BTS.shape[0], queries, keys))


def causal(valid_BS: Array) -> Array:
    """The whole mask [B, S, S] of sequences whose every valid position is a query too."""
    mask_BSS = Mask(first=0, valid_BS=valid_BS).dense(valid_BS.shape[1], valid_BS.shape[1])
    assert mask_BSS is not None
    return mask_BSS


def running_positions(valid_BT: Array, first: int | Array = 0) -> Array:
    """Position ids that count valid entries only, from `first`; invalid entries get 1.

    The 1 has no effect (an invalid entry is seen by none); it is what the release computes
    (docs/release.md, "Masks"), so that every intermediate array can be compared with it.

        running_positions([[1, 0, 1, 1]], first=5) = [[5, 1, 6, 7]]
    """
    counted = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1 + first
    return jnp.where(valid_BT, counted, 1)
