"""Files that survive a kill: JSON lines that are appended to and taken up again, whole texts."""

import json
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath


class Journal:
    """JSON lines, one object each, at `path`; no file is made before there is a line.

    Opening it keeps of an earlier run's lines those that `keep` accepts, and drops half a line that
    a killed process left. `write` False only reads: for all processes of a run but one.
    """

    def __init__(
        self, path: epath.PathLike, keep: Callable[[dict[str, Any]], bool], *, write: bool = True
    ):
        self._path = epath.Path(path)
        self._in_bucket = "://" in str(self._path)
        self._write = write
        before = self._path.read_text() if self._path.exists() else ""
        parsed = [(text, _object(text)) for text in before.splitlines()]
        kept = [(text, line) for text, line in parsed if line is not None and keep(line)]
        self.lines = [line for _, line in kept]
        self._texts = [text + "\n" for text, _ in kept]
        if self._write and "".join(self._texts) != before:
            self._rewrite()

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        text = json.dumps(line) + "\n"
        self._texts.append(text)
        if not self._write:
            return
        if self._in_bucket:  # nothing can be appended there
            self._rewrite()
            return
        # Opened for each line: what is closed has left this process, and survives its end.
        with self._path.open("a") as file:
            file.write(text)

    def sort(self, key: Callable[[dict[str, Any]], Any]) -> None:
        """Puts the lines in order, in the file too."""
        if self.lines != (ordered := sorted(self.lines, key=key)):
            self.lines = ordered
            self._texts = [json.dumps(line) + "\n" for line in ordered]
            if self._write:
                self._rewrite()

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(self._texts))


def write_whole(path: epath.PathLike, text: str) -> None:
    """All of a file or, if anything interrupts, what was there before."""
    path = epath.Path(path)
    if "://" in str(path):  # a bucket, where every writing is like that
        path.write_text(text)
        return
    # In the same folder: a rename is atomic within one file system only.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # machines may share the folder
    try:
        beside.write_text(text)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _object(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # the process ended in the middle of this line
        return None
    return line if isinstance(line, dict) else None
