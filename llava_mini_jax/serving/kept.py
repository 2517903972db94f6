"""Media that clients have named, so that they need not send them twice.

(tenant, uuid) --> an image's pixels, or a film's Source, as long as all of them fit the budget;
                   the longest unused goes
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llava_mini_jax.serving.sources import Source

_ENTRY = 1000  # bytes that an entry takes beside its content
T = TypeVar("T")


@dataclass(frozen=True)
class Pixels:
    """An image as the model reads it, whichever detail it is asked for with."""

    digest: bytes  # of its content
    frames: Mapping[bool, np.ndarray]  # with low detail, and without

    @property
    def size(self) -> int:
        return sum(frame.nbytes for frame in self.frames.values())


class Kept:
    """Media by tenant and the client's name for them; any thread may ask."""

    def __init__(self, budget: int):
        self._budget, self._used = budget, 0
        self._media: OrderedDict[tuple[str, str], Source | Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, tenant: str, uuid: str, medium: Source | Pixels) -> None:
        with self._lock:
            self._drop((tenant, uuid))
            self._media[tenant, uuid] = medium
            self._used += medium.size + _ENTRY
            while self._used > self._budget:
                self._drop(next(iter(self._media)))

    def get(self, tenant: str, uuid: str, kind: type[T]) -> T | None:
        """None where there is none of this name, or one of another kind."""
        with self._lock:
            found = self._media.get((tenant, uuid))
            if found is not None:
                self._media.move_to_end((tenant, uuid))
            return found if isinstance(found, kind) else None

    @property
    def used(self) -> int:
        """Bytes."""
        with self._lock:
            return self._used

    def _drop(self, name: tuple[str, str]) -> None:
        medium = self._media.pop(name, None)
        if medium is not None:
            self._used -= medium.size + _ENTRY
