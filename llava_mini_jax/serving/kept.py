"""Media that clients have named, so that they need not send them twice.

(tenant, kind, uuid) --> Source, as long as all of them fit the budget; the longest unused goes
"""

import threading
from collections import OrderedDict

from llava_mini_jax.serving.sources import Source

_ENTRY = 1000  # bytes that an entry takes beside its content
_Name = tuple[str, str, str]


class Kept:
    """Sources by tenant, kind ("image", "video") and the client's name; any thread may ask."""

    def __init__(self, budget: int):
        self._budget, self._used = budget, 0
        self._sources: OrderedDict[_Name, Source] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: _Name, source: Source) -> None:
        with self._lock:
            self._drop(name)
            self._sources[name] = source
            self._used += source.size + _ENTRY
            while self._used > self._budget:
                self._drop(next(iter(self._sources)))

    def get(self, name: _Name) -> Source | None:
        with self._lock:
            if name in self._sources:
                self._sources.move_to_end(name)
            return self._sources.get(name)

    @property
    def used(self) -> int:
        """Bytes."""
        with self._lock:
            return self._used

    def _drop(self, name: _Name) -> None:
        source = self._sources.pop(name, None)
        if source is not None:
            self._used -= source.size + _ENTRY
