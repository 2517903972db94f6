"""The order in which a run sees its samples: position of the endless stream -> sample.

    "none"              one shuffle of all samples an epoch (Grain's; nothing is held)
    "modality"          an epoch in whole batches of images, of videos and of text, shuffled
    "modality_length"   as above, and the samples of a batch have nearly as many words

                epoch e:   | head |  batch  |  batch  | ... |  batch  | tail |
    batches of the stream: ------>|<------->|<------->| ... |<------->|<------

Every epoch holds every sample once and is a function of seed and epoch alone. Where the batch size
does not divide the number of samples, an epoch begins and ends inside a batch: head and tail are
made of what is left over of each modality. Of what is then still left over, at most one batch less
than there are modalities is mixed (LLaVA's --group_by_modality_length mixes its last batch alike).
"""

import functools
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

from llava_mini_jax.errors import InputError

GROUPINGS = ("none", "modality", "modality_length")
MODALITIES = ("image", "video", "text")
_MEGA = 50  # batches that are sorted by length together, as in transformers' group_by_length


class Groups(NamedTuple):
    """What a grouped order needs to know about every sample."""

    modality: np.ndarray  # int8 [n], index into MODALITIES
    words: np.ndarray  # int32 [n], of the whole conversation


def make_order(source: Any, grouping: str, batch_size: int, seed: int) -> Any:
    """A Grain dataset of sample indices, without end.

    A grouped order needs a source with `groups() -> Groups`, as sources.Samples has it. Raises
    InputError for an unknown grouping, and for a source that cannot tell its groups.
    """
    import grain

    if grouping not in GROUPINGS:
        raise InputError(f'The grouping is "{grouping}"; use one of {", ".join(GROUPINGS)}.')
    if grouping == "none":
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()  # pyright: ignore
    if not hasattr(source, "groups"):
        raise InputError(
            f'The grouping is "{grouping}", but {source!r:.80} is all of one kind; use "none".'
        )
    order = GroupedOrder(source.groups(), batch_size, seed, by_length=grouping == "modality_length")
    return grain.MapDataset.source(order)


class GroupedOrder:
    """`order[k]` is the k-th sample of a run. Holds two epochs' orders, 8 bytes a sample each."""

    def __init__(self, groups: Groups, batch_size: int, seed: int, *, by_length: bool):
        self._groups = groups
        self._batch_size = batch_size
        self._seed = seed
        self._by_length = by_length
        self._lock = threading.Lock()  # threads that meet a new epoch make its order once
        self._epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def __repr__(self) -> str:
        settings = f"{self._batch_size}, {self._seed}, by_length={self._by_length}"
        return f"GroupedOrder({len(self._groups.modality)} samples, {settings})"

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, len(self._groups.modality))
        with self._lock:
            return int(self._epoch(epoch)[place])

    def epoch(self, number: int) -> np.ndarray:
        """int64 [n]: the samples of an epoch in their order."""
        total, size = len(self._groups.modality), self._batch_size
        # What fills up the batch that the epoch before has begun.
        head = min(-number * total % size, total)
        rng = np.random.default_rng([self._seed, number])
        parts = [self._whole_batches(rng, kind) for kind in range(len(MODALITIES))]
        batches = np.concatenate([whole for whole, _ in parts])
        left_over = np.concatenate([rest for _, rest in parts])
        count = (total - head) // size
        missing = max(0, count - len(batches)) * size
        mixed, loose = left_over[:missing].reshape(-1, size), left_over[missing:]
        batches = rng.permutation(np.concatenate([batches, mixed]))
        loose = np.concatenate([loose, batches[count:].ravel()])
        return np.concatenate([loose[:head], batches[:count].ravel(), loose[head:]])

    def _whole_batches(self, rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """All samples of a modality as batches [k, batch_size], and those that fill none."""
        size = self._batch_size
        samples = rng.permutation(np.flatnonzero(self._groups.modality == kind))
        count = len(samples) // size
        whole, rest = samples[: count * size], samples[count * size :]
        if self._by_length:
            # Sorting all of a modality would give every epoch the same batches.
            mega = max(1, min(count // 4, _MEGA)) * size
            group = np.arange(len(whole)) // mega
            whole = whole[np.lexsort((self._groups.words[whole], group))]
        return whole.reshape(count, size), rest
