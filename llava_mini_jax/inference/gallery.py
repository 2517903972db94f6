"""The images and films that an engine has seen, found again by their content.

    (tenant, key) --find--> Seen: visual tokens of its chunks, and what the Shelf keeps of them
                  --open--> a new one, which the engine fills chunk by chunk

What has not been used for longest goes when the budget is full; what a request works with stays.
What a request has left half seen is seen to its end by the next one.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llava_mini_jax.inference.shelf import Budget, Kept, Shelf
from llava_mini_jax.inference.ticket import Medium
from llava_mini_jax.models.compressors import Compressed, Taken


@dataclass
class Seen:
    """What is known of one image or film; complete once it has `expected` frames."""

    name: tuple[str, bytes] | None  # (tenant, key); None: nobody will look for it
    expected: int  # frames; a film that is still being made has more the next time
    first: int  # the number of its first visual token, among all that this gallery has seen
    only: slice | None = None  # of each frame's tokens, those that are kept; None: all of them
    # Of each chunk [frames, Q, D], or [n, D] those that are there where images have different
    # numbers of tokens; or (what a program gives, first frame, frames).
    tokens: list[Any] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    frames: int = 0  # seen so far
    bytes: int = 0  # that its tokens may take
    users: int = 0  # requests that work with it
    owner: Any = None  # the one of them that adds to it

    def settled(self) -> list[np.ndarray]:
        """The visual tokens on the host, which waits for the programs that make them."""
        for number in range(len(self.tokens)):
            self.settle(number)
        return self.tokens

    def settle(self, number: int) -> None:
        """The same for one chunk."""
        chunk = self.tokens[number]
        if isinstance(chunk, tuple):
            given, first, count = chunk
            tokens_IQD = np.asarray(given.tokens_IQE)[first : first + count]
            own = tokens_IQD if self.only is None else tokens_IQD[:, self.only]
            if given.valid_IQ is not None:
                own = tokens_IQD[np.asarray(given.valid_IQ)[first : first + count]]
            # A copy: what was computed together with it is not kept.
            self.tokens[number] = own.copy()

    def of(self, taken: Taken) -> list[np.ndarray]:
        """The visual tokens [n, D] of each chunk that a request takes."""
        found = []
        for chunk in self.settled():
            if chunk.ndim == 3 and self.only is None:
                chunk = chunk[:, taken.places]
            found.append(chunk.reshape(-1, chunk.shape[-1]))
        return found

    def numbers(self, taken: Taken) -> np.ndarray:
        """The numbers of these tokens among all that the gallery has seen.

        Where an image has fewer than it might have, those that are not there have none.
        """
        if any(chunk.ndim == 2 for chunk in self.settled()):
            return self.first + np.arange(sum(map(len, self.settled())), dtype=np.int64)
        frames_F = np.arange(self.expected, dtype=np.int64)
        tokens_Q = taken.first + np.arange(taken.count, dtype=np.int64)
        return self.first + (frames_F[:, None] * taken.made + tokens_Q).ravel()

    @property
    def complete(self) -> bool:
        return self.frames == self.expected


class Gallery:
    """`budget` is that of all tenants together."""

    def __init__(self, budget: Budget):
        self._shelf = Shelf(budget)
        self._token_bytes = 0  # on the host beside the shelf; they count as if they lay on it
        self._known: dict[tuple[str, bytes], Seen] = {}  # the longest unused first
        self._numbers = itertools.count()

    def find(self, tenant: str, medium: Medium) -> Seen | None:
        """What is known of a medium, also while another request still looks at it."""
        seen = self._known.pop((tenant, medium.key), None) if medium.key else None
        if seen is not None:
            self._known[tenant, medium.key] = seen
            seen.expected = max(seen.expected, medium.frames)
        return seen

    def open(self, tenant: str, medium: Medium) -> Seen:
        """A medium that is looked at for the first time."""
        name = (tenant, medium.key) if medium.key else None
        seen = Seen(name, medium.frames, next(self._numbers) * 2**32, medium.kept)
        if name is not None:
            self._known[name] = seen
        return seen

    def put(
        self,
        seen: Seen,
        visual: Compressed,
        first: int,
        count: int,
        stages: Mapping[str, Any],
        following: int,
    ) -> None:
        """Another `count` frames, whose visual tokens are those of a chunk from `first` on.

        `stages` are Shelf's; `following` chunks like this one are still to come.
        """
        kept = Kept("source", "", count, None)
        found = {tier: tree for tier, tree in stages.items() if tree is not None}
        I, Q, _ = visual.tokens_IQE.shape
        kept_tokens = len(range(Q)[seen.only or slice(None)])
        bytes_ = visual.tokens_IQE.nbytes // (I * max(Q, 1)) * kept_tokens * count
        self._make_room(bytes_ + max(map(_size, found.values()), default=0))
        if seen.name is not None and found:
            kept = self._shelf.put(count, found, following)
        if seen.tokens:
            # It is computed by now. All at the end would take long where a film has thousands.
            seen.settle(len(seen.tokens) - 1)
        tokens, all_kept = [*seen.tokens, (visual, first, count)], [*seen.kept, kept]
        frames, own = seen.frames + count, seen.bytes + bytes_
        taken = self._token_bytes + bytes_
        # In one statement, which Ctrl-C does not divide: a frame is seen or it is not.
        seen.tokens, seen.kept, seen.frames, seen.bytes, self._token_bytes = (
            *(tokens, all_kept, frames),
            *(own, taken),
        )

    def get(self, kept: Kept) -> Any:
        return self._shelf.get(kept)

    def leave(self, seen: Seen, *, failed: bool = False) -> None:
        """A request has done with it, or has `failed`: then what is half seen is forgotten."""
        seen.users -= 1
        if not seen.users and (seen.name is None or (failed and not seen.complete)):
            self._forget(seen)

    def abandon(self) -> None:
        """All requests have gone, wherever they stood."""
        for seen in self._known.values():
            seen.users, seen.owner = 0, None

    def used(self) -> dict[str, int]:
        """Bytes by place, and how many images and films are known."""
        return {**self._shelf.used(), "tokens": self._token_bytes, "media": len(self._known)}

    def _make_room(self, size: int) -> None:
        for seen in list(self._known.values()):
            if self._shelf.room() - self._token_bytes >= size:
                return
            if not seen.users:
                self._forget(seen)

    def _forget(self, seen: Seen) -> None:
        if seen.name is not None and self._known.get(seen.name) is seen:
            del self._known[seen.name]
        for kept in seen.kept:
            self._shelf.drop(kept)
        self._token_bytes -= seen.bytes
        seen.kept, seen.tokens, seen.bytes = [], [], 0


def _size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
