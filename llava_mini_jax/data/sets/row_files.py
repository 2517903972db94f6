"""The rows of data files, parsed one by one, whatever files they are.

    path, URL or pattern --open_rows--> Rows: rows[i], a dict if the file is right;
        rows.place(i), where an editor finds it
    .json, .jsonl (here)   .parquet, datasets' folders (arrow_files.py)   .tar (tar_rows.py)
    folders that were built (arrayrecord.py)

Nothing here knows what a sample is; `sources.Samples` makes samples of rows.
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llava_mini_jax.data.sets import arrayrecord, arrow_files, tar_rows
from llava_mini_jax.data.sets.data_files import (
    DataFile,
    cannot_read,
    digest_of,
    files_like,
    is_pattern,
    is_remote,
    matching,
    parse_json,
    remote,
)
from llava_mini_jax.errors import InputError

_SCAN_BYTES = 2**24
_SHORT_LINE = 64  # only lines up to here are looked at for being blank; no sample is as short


class Rows(Protocol):
    """A file's rows, parsed; `row[i]` raises InputError where it cannot be."""

    media_beside: bool  # images and videos are files of their own

    @property
    def files(self) -> Sequence[DataFile]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...
    def place(self, row: int) -> str:
        """Where a row stands, as an editor counts."""
        ...

    def digests(self) -> dict[str, str]:
        """By file, SHA-256 of what is in it: of all text, and of no images."""
        ...


def open_rows(place: Path | str) -> Rows:
    """Raises InputError for what is no data file, and for one without a sample."""
    folder = _rows_of_folder(str(place)) if _is_folder(place) else None
    rows = _rows_of_files(place) if folder is None else folder
    if not len(rows):
        raise InputError(f"The data file {place} holds no samples; give one that does.")
    return rows


def is_built(place: Path | str) -> bool:
    """Whether `llava-mini data build` wrote it; `datasets` has a file of the same name."""
    path = Path(place)
    return (path / arrayrecord.INFO).exists() and not arrow_files.is_saved(path)


def _is_folder(place: Path | str) -> bool:
    if not is_remote(place):
        return os.path.isdir(place)
    named = remote(str(place))
    try:
        return named.fs.isdir(named.path)
    except Exception as error:  # what buckets' packages raise has no common base
        raise cannot_read(str(place), error) from error


def _rows_of_folder(place: str) -> Rows:
    """ArrayRecord or Arrow files with their own description, or a folder of Parquet files."""
    if not is_remote(place):
        if is_built(place):
            return arrayrecord.BuiltRows(Path(place))
        if arrow_files.is_saved(Path(place)):
            return arrow_files.SavedRows(Path(place))
    pattern = f"{place.rstrip('/') if is_remote(place) else glob.escape(place)}/*.parquet"
    files = files_like(pattern)
    if not files:
        raise InputError(
            f"The folder {place} holds no .parquet files, and neither `llava-mini data build` nor"
            " `datasets` has saved it; give such a folder, or a data file"
            f" ({', '.join(_KINDS)})."
        )
    return arrow_files.ParquetRows(files)


def _rows_of_files(place: Path | str) -> Rows:
    suffix = Path(str(place)).suffix.lower()
    kind = _KINDS.get(suffix)
    if kind is None:
        raise InputError(
            f'The data file {place} ends in "{suffix}"; expected {", ".join(_KINDS)}.'
            " Rename or convert it."
        )
    if is_pattern(place) and kind in (_JsonList, _JsonLines):
        raise InputError(f"{place} matches several files; list each separately (a .yaml list).")
    files = matching(place)
    try:
        return kind(files)
    except OSError as error:
        raise cannot_read(str(place), error) from error


class _JsonList:
    """LLaVA's and Video-ChatGPT's files. All of it is held in memory, as its format demands."""

    media_beside = True

    def __init__(self, files: Sequence[DataFile]):
        self.files = files
        expected = 'a list of samples; if each line is a sample, name the file ".jsonl"'
        self._rows = parse_json(files[0].read_bytes(), f"The data file {files[0]}", expected)
        if not isinstance(self._rows, list):
            raise InputError(
                f"The data file {files[0]} holds a {type(self._rows).__name__}; expected"
                f" {expected}."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._rows[row]

    def place(self, row: int) -> str:
        return f"{self.files[0]}, item {row + 1}"

    def digests(self) -> dict[str, str]:
        return {file.name: digest_of(file) for file in self.files}


class _JsonLines:
    """A sample a line. The file is mapped (one in a bucket is held), with 16 bytes a line; lines
    are parsed when they are read."""

    media_beside = True

    def __init__(self, files: Sequence[DataFile]):
        self.files = files
        size = files[0].stat().st_size
        self._bytes = np.zeros(0, np.uint8)
        if size and isinstance(files[0], Path):
            self._bytes = np.memmap(files[0], np.uint8, "r")
        elif size:
            self._bytes = np.frombuffer(files[0].read_bytes(), np.uint8)
        pieces = range(0, size, _SCAN_BYTES)
        newlines = [s + np.flatnonzero(self._bytes[s : s + _SCAN_BYTES] == 10) for s in pieces]
        ends = np.concatenate([*newlines, [size]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        short = np.flatnonzero(ends - starts <= _SHORT_LINE)
        blank = [i for i in short if not self._bytes[starts[i] : ends[i]].tobytes().strip()]
        self._lines = np.delete(np.arange(len(ends)), blank)
        self._starts, self._ends = starts[self._lines], ends[self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> Any:
        line = self._bytes[self._starts[row] : self._ends[row]].tobytes()
        return parse_json(line, self.place(row), "one sample a line")

    def place(self, row: int) -> str:
        return f"{self.files[0]}, line {self._lines[row] + 1}"

    def digests(self) -> dict[str, str]:
        return {file.name: digest_of(file) for file in self.files}


_KINDS: dict[str, Any] = {
    ".json": _JsonList,
    ".jsonl": _JsonLines,
    ".parquet": arrow_files.ParquetRows,
    ".tar": tar_rows.TarRows,
}
