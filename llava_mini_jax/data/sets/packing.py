"""Which conversations share a row of a packed run: position of the endless stream -> samples.

    what each sample needs --PackedOrder--> order[k]: the samples of the run's k-th row

    an epoch's samples, shuffled:   | window | window | ... | window |
    rows of a window:                longest first, each into the row with the fewest images that
                                     has room; what finds no room waits for the next window

Every epoch holds every sample once, and is a function of seed and epoch alone; how many rows it has
is known once it is made, so a run that goes on at a row makes the epochs before it again (some
seconds for a million samples), and reads none of them.

Rows should be full of positions, which is what packing is for, and alike in images, because all
rows have room for the most images that one of them may have.
"""

import bisect
import dataclasses
import functools
import sys
import threading
from typing import NamedTuple

import numpy as np

from llava_mini_jax.errors import InputError

_PACK = 0x7061636B  # these shuffles' own stream: other orders are drawn from the seed, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Whether a row of a batch may hold several conversations, and its room for images."""

    window: int = 0  # conversations from which rows are packed; 0: one conversation a row
    images: int = 0  # images or frames that fit a row; all rows are padded to it


NO_PACKING = PackingConfig()


class Needs(NamedTuple):
    """What samples take of a row; all 0 where one cannot be read."""

    positions: np.ndarray  # int32 [n]: of the language model, or ids of text if they are more
    images: np.ndarray  # int32 [n]: or frames
    fused: np.ndarray  # int32 [n]: ids of text that its images are fused with


class Filling(NamedTuple):
    rows: int
    positions: float  # share of them that holds something
    images: float  # of a row, on average
    most_images: int  # of a row


class PackedOrder:
    """`order[k]` is a tuple of samples that need at most `positions` and `images` together.

    One that needs more positions alone has a row of its own, where its end is cut off. Holds two
    epochs' rows. Raises InputError for numbers that allow no row.
    """

    def __init__(self, needs: Needs, positions: int, images: int, window: int, seed: int):
        if min(positions, window) < 1 or images < 0:
            raise InputError(
                f"rows of {positions} positions and {images} images out of {window} conversations:"
                " each number must be 1 or more"
            )
        # What is too long is cut; what has too many images is refused when it is read.
        self._positions = np.minimum(needs.positions, positions).astype(np.int64)
        self._images = np.minimum(needs.images, images).astype(np.int64)
        self._room, self.images = (positions, images), images
        self._window, self._seed = window, seed
        self._lock = threading.Lock()  # threads that meet a new epoch make its rows once
        self._ends: list[int] = []  # rows up to the end of each epoch that was made
        self._epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def __repr__(self) -> str:
        room = "{} positions and {} images".format(*self._room)
        return f"PackedOrder({len(self._positions)} samples, {room}, {self._window}, {self._seed})"

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, ...]:
        with self._lock:
            while not self._ends or self._ends[-1] <= index:
                made = len(self._epoch(len(self._ends)))
                self._ends.append(made + (self._ends[-1] if self._ends else 0))
            number = bisect.bisect_right(self._ends, index)
            begins = self._ends[number - 1] if number else 0
            return self._epoch(number)[index - begins]

    def epoch(self, number: int) -> list[tuple[int, ...]]:
        """The rows of an epoch in their order."""
        rng = np.random.default_rng([self._seed, _PACK, number])
        samples = rng.permutation(len(self._positions))
        rows: list[tuple[int, ...]] = []
        waiting = samples[:0]
        for start in range(0, len(samples), self._window):
            last = start + self._window >= len(samples)
            found = np.concatenate([waiting, samples[start : start + self._window]])
            made, waiting = self._fill(found, all_of_them=last)
            rows += [made[place] for place in rng.permutation(len(made))]
        return rows

    def filling(self, number: int = 0) -> Filling:
        """How full an epoch's rows are."""
        rows = [list(row) for row in self._epoch(number)]
        images = [int(self._images[row].sum()) for row in rows]
        taken, room = sum(int(self._positions[row].sum()) for row in rows), self._room[0]
        return Filling(len(rows), taken / (room * len(rows)), sum(images) / len(rows), max(images))

    def _fill(
        self, samples: np.ndarray, *, all_of_them: bool
    ) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """(rows, samples that found no room): as many rows as the samples would fill."""
        positions, images = self._positions[samples], self._images[samples]
        room, most = self._room
        # The last window's samples have to go somewhere, if a row is left half empty.
        total = int(positions.sum())
        least = max(1, -(-total // room)) if all_of_them else total // room
        count = max(least, int(images.sum()) // most if most else 0)
        rows: list[list[int]] = [[] for _ in range(count)]
        free, places = np.full(count, room), np.full(count, most)
        waiting = []
        for n in np.argsort(-positions, kind="stable"):
            fits = (free >= positions[n]) & (places >= images[n])
            # Of those with the fewest images the fullest.
            best = np.where(fits, places * (room + 1) - free, -room - 1)
            row = int(best.argmax()) if count else 0
            if not count or not fits[row]:
                waiting.append(n)
                continue
            rows[row].append(int(samples[n]))
            free[row] -= positions[n]
            places[row] -= images[n]
        made = [tuple(row) for row in rows if row]
        rest = samples[np.array(waiting, np.int64)]
        if all_of_them and len(rest):
            more, rest = self._fill(rest, all_of_them=True)
            made += more
        return made, rest
