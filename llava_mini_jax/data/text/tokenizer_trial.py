"""A tokenizer.json is tried where it can do no harm, before this process loads it.

Damaged files raise anything: errors, panics, allocations that end the process, loops. So a process
of its own (guarded.py) loads each file first, writes and reads some lines of text with it, and ends
in our place. A file with the same content is tried once in a run. The trial takes as long as
loading; both processes start at once.
"""

import hashlib
import threading
from pathlib import Path
from typing import Any

from llava_mini_jax.data.text.guarded import Guarded, Refused
from llava_mini_jax.errors import InputError

# The longest published ones have 35 MB. LLaMA-3's 9 MB take 0.7 s and 200 MB.
_LARGEST = 256 * 2**20
_SECONDS, _SECONDS_A_MB, _MEGABYTES, _MEGABYTES_A_MB = 5.0, 1.0, 1024, 64
_passed: set[str] = set()


class Trial:
    """Of a file; it runs while the `with` block does other things, until `result` is asked for."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "Trial":
        try:
            size = self.path.stat().st_size
            if size > _LARGEST:
                raise InputError(
                    f"{self.path} has {size} bytes, more than a tokenizer needs ({_LARGEST} at"
                    " most): restore the file"
                )
            self._size = size / 2**20
            self._digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error}); restore the file") from error
        self._reason: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._digest not in _passed:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _run(self) -> None:
        guarded = Guarded()
        try:
            given = {"path": str(self.path)}
            guarded.do(
                "try_tokenizer",
                given,
                seconds=_SECONDS + _SECONDS_A_MB * self._size,
                megabytes=int(_MEGABYTES + _MEGABYTES_A_MB * self._size),
            )
        except Refused as error:
            self._reason = str(error)
        finally:
            guarded.close()

    def result(self) -> None:
        """Waits for the end; raises InputError with what was found."""
        if self._digest in _passed:
            return
        self._thread.join()
        if self._reason is not None:
            raise InputError(
                f"{self.path} is not a tokenizer that can be used ({self._reason}): restore the"
                " file"
            )
        _passed.add(self._digest)
