"""What a session keeps of the frames that it has seen, within budgets of bytes.

                kept                                        a question then costs
    memory      pre-fusion's keys and values of patches     its text in pre-fusion
    features    the tower's patches                         that, and the patches in pre-fusion
    source      nothing: the frames are read again          that, and the tower

Each chunk of frames is kept as the first of these that has room on the device, in the host's
memory, or on disk, tried in this order, and leaves room for the chunks that follow as the smallest
of them: looking at a frame again costs more than any of them saves. What has no file to be read
again is kept as pixels in any case, beside the shelf (session_media.py). All give the same numbers:
they are stages of one computation that does not depend on the question.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import numpy as np

from llava_mini_jax.errors import InputError

TIERS = ("memory", "features", "pixels", "source")  # "pixels" are not the shelf's: as "source"
PLACES = ("device", "host", "disk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that cached frames may take. Raises InputError for negative numbers.

    Arrays and images that you gave a session stay in host memory in addition.
    """

    device: int = 0
    host: int = 2**31
    disk: int = 0  # in a temporary folder, removed with the session
    best: str = "memory"  # the first tier that is tried

    def __post_init__(self) -> None:
        for place in PLACES:
            if getattr(self, place) < 0:
                raise InputError(
                    f"a budget is {getattr(self, place)} bytes of {place}; give 0 or more"
                )
        if self.best not in TIERS:
            raise InputError(f"a session keeps {self.best!r}; give one of {', '.join(TIERS)}")


class Kept(NamedTuple):
    """A chunk on the shelf."""

    tier: str
    place: str
    frames: int  # real ones; the rest of the chunk is padding
    arrays: Any  # a tree of arrays, or of files


class _File(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class Shelf:
    """Chunks of one engine; nothing of it is shared with another."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._used: dict[str, int] = dict.fromkeys(PLACES, 0)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files = 0

    def put(self, frames: int, stages: dict[str, Any], following: int) -> Kept:
        """Keeps a chunk's `frames` as one of `stages`, {tier: tree of arrays}.

        `following` chunks like it are still to come.
        """
        sizes = {
            tier: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tier, tree in stages.items()
            if tree is not None
        }
        tier, place = self.choose(sizes, following)
        if tier == "source":
            return Kept(tier, place, frames, None)
        written = self._files
        try:
            return Kept(tier, place, frames, self._store(stages[tier], place))
        except BaseException:  # a full disk, Ctrl-C: nothing of the chunk stays
            self._used[place] -= sizes[tier]
            for number in range(written, self._files):
                self._path(number + 1).unlink(missing_ok=True)
            raise

    def choose(self, sizes: Mapping[str, int], following: int) -> tuple[str, str]:
        """(tier, place) of a chunk that takes `sizes` bytes in its tiers; its room is taken."""
        rooms = {place: getattr(self._budget, place) - self._used[place] for place in PLACES}
        tiers = [tier for tier in TIERS[TIERS.index(self._budget.best) :] if tier in sizes]
        least = min((sizes[tier] for tier in tiers), default=0)
        for tier in tiers:
            size = sizes[tier]
            # A richer form only where every chunk to come still fits in its smallest one.
            enough = size == least or size + following * least <= sum(rooms.values())
            for place, room in rooms.items():
                if enough and size <= room:
                    self._used[place] += size
                    return tier, place
        return "source", ""

    def get(self, kept: Kept) -> Any:
        """The tree of arrays that `put` was given; on the host or on the device."""
        return jax.tree.map(_read, kept.arrays, is_leaf=lambda leaf: isinstance(leaf, _File))

    def drop(self, kept: Kept) -> None:
        """Gives the room of a chunk back; whoever reads it at this moment reads it to its end."""
        for leaf in jax.tree.leaves(kept.arrays, is_leaf=lambda leaf: isinstance(leaf, _File)):
            if isinstance(leaf, _File):
                self._used[kept.place] -= math.prod(leaf.shape) * leaf.dtype.itemsize
                leaf.path.unlink(missing_ok=True)
            else:
                self._used[kept.place] -= leaf.nbytes

    def room(self) -> int:
        """Bytes that are free in all places."""
        return sum(getattr(self._budget, place) - self._used[place] for place in PLACES)

    def used(self) -> dict[str, int]:
        """Bytes by place."""
        return dict(self._used)

    def _store(self, tree: Any, place: str) -> Any:
        if place == "device":
            return jax.tree.map(jax.numpy.asarray, tree)
        host = jax.tree.map(np.asarray, tree)
        return host if place == "host" else jax.tree.map(self._write, host)

    def _write(self, array: np.ndarray) -> _File:
        # Counted before it is written: `put` then removes what a full disk cut short.
        self._files += 1
        path = self._path(self._files)
        array.tofile(path)
        return _File(path, array.shape, array.dtype)

    def _path(self, number: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="llava-mini-")
        return Path(self._folder.name) / str(number)


def _read(leaf: Any) -> Any:
    if isinstance(leaf, _File):
        return np.fromfile(leaf.path, leaf.dtype).reshape(leaf.shape)
    return leaf
