"""The rows of data files, parsed one by one: JSON list, JSON Lines, Parquet, ArrayRecord.

    path --open_rows--> Rows: rows[i], a dict if the file is right; rows.place(i), where an editor
                              finds it

Nothing here knows what a sample is; `sources.Samples` makes samples of rows.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llava_mini_jax.data.sets import arrayrecord
from llava_mini_jax.errors import InputError

_COLUMNS = ("id", "image", "images", "video", "conversations", "q", "a", "video_id")
_SCAN_BYTES = 2**24
_SHORT_LINE = 64  # only lines up to here are looked at for being blank; no sample is as short


class Rows(Protocol):
    """A file's rows, parsed; `row[i]` raises InputError where it cannot be."""

    files: Sequence[Path]
    media_beside: bool  # pictures and videos are files of their own

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...
    def place(self, row: int) -> str:
        """Where a row stands, as an editor counts."""
        ...

    def digests(self) -> dict[str, str]:
        """By file, SHA-256 of what is in it: of all text, and of no pictures."""
        ...


def digest_of(path: Path, ranges: Iterable[tuple[int, int]] | None = None) -> str:
    """SHA-256 of a file, or of its ranges (from, how many bytes); InputError if it is gone."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for start, left in [(0, path.stat().st_size)] if ranges is None else ranges:
                file.seek(start)
                while left > 0 and (piece := file.read(min(left, _SCAN_BYTES))):
                    digest.update(piece)
                    left -= len(piece)
    except OSError as error:
        raise InputError(f"Cannot read the data file {path}: {error}; check it.") from error
    return digest.hexdigest()


def existing_file(path: Path | str) -> Path:
    if not os.path.isfile(path):
        problem = "it is not a file" if os.path.exists(path) else "there is no such file"
        raise InputError(f"Cannot open the data file {path}: {problem}; check the path.")
    return Path(path)


def open_rows(path: Path) -> Rows:
    kinds: dict[str, Any] = {".json": _JsonList, ".jsonl": _JsonLines, ".parquet": _Parquet}
    if os.path.isdir(path):
        if (path / arrayrecord.INFO).exists():
            return arrayrecord.BuiltRows(path)
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise InputError(
                f"The folder {path} holds no .parquet files and was not built by `llava-mini data"
                f" build`; give such a folder, or a data file ({', '.join(kinds)})."
            )
        rows: Rows = _Parquet(files)
    else:
        path = existing_file(path)
        kind = kinds.get(path.suffix.lower())
        if kind is None:
            raise InputError(
                f'The data file {path} ends in "{path.suffix}"; expected {", ".join(kinds)}.'
                " Rename or convert it."
            )
        try:
            rows = kind([path])
        except OSError as error:
            raise InputError(f"Cannot read the data file {path}: {error}; check it.") from error
    if not len(rows):
        raise InputError(f"The data file {path} holds no samples; give one that does.")
    return rows


def _parse(content: bytes, place: str, expected: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; expected {expected}.") from error
    except ValueError as error:  # broken JSON, broken UTF-8, a number of ten thousand digits
        raise InputError(
            f"{place}: no JSON ({error}); expected {expected}. Correct it or copy it again."
        ) from error


class _JsonList:
    """LLaVA's and Video-ChatGPT's files. All of it is held in memory, as its format demands."""

    media_beside = True

    def __init__(self, files: Sequence[Path]):
        self.files = files
        expected = 'a list of samples; if each line is a sample, name the file ".jsonl"'
        self._rows = _parse(files[0].read_bytes(), f"The data file {files[0]}", expected)
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
    """A sample a line. The file is mapped, 16 bytes a line are held; lines are parsed when read."""

    media_beside = True

    def __init__(self, files: Sequence[Path]):
        self.files = files
        size = files[0].stat().st_size
        self._bytes = np.memmap(files[0], np.uint8, "r") if size else np.zeros(0, np.uint8)
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
        return _parse(line, self.place(row), "one sample a line")

    def place(self, row: int) -> str:
        return f"{self.files[0]}, line {self._lines[row] + 1}"

    def digests(self) -> dict[str, str]:
        return {file.name: digest_of(file) for file in self.files}


class _Parquet:
    """Parquet files as on the Hugging Face hub, pictures inside or beside them.

    A row group is the smallest piece that can be read, so the last few are kept.
    """

    def __init__(self, files: Sequence[Path]):
        import pyarrow.parquet as parquet

        self.files = files
        self._parquet = parquet
        groups: list[tuple[int, int]] = []  # file, row group
        sizes: list[int] = []
        self._text: dict[str, list[tuple[int, int]]] = {}  # ranges of each file without pictures
        self.media_beside = True
        for number, file in enumerate(files):
            try:
                metadata = parquet.read_metadata(file)
            except Exception as error:  # pyarrow has no common base for what damaged files raise
                raise _no_parquet(file, error) from error
            chunks = [
                metadata.row_group(g).column(c)
                for g in range(metadata.num_row_groups)
                for c in range(metadata.num_columns)
            ]
            text = [chunk for chunk in chunks if not _is_media(chunk)]
            self.media_beside &= len(text) == len(chunks)
            end = file.stat().st_size
            footer = (max(0, end - metadata.serialized_size - 8), end)
            self._text[file.name] = [*map(_range_of, text), footer]
            groups += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._groups = groups
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._read = functools.lru_cache(maxsize=4)(self._read_group)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))
        table = self._read(group)
        return table.slice(row - int(self._ends[group]) + table.num_rows, 1).to_pylist()[0]

    def place(self, row: int) -> str:
        number, _ = self._groups[int(np.searchsorted(self._ends, row, side="right"))]
        first = next(g for g, (file, _) in enumerate(self._groups) if file == number)
        before = int(self._ends[first - 1]) if first else 0
        return f"{self.files[number]}, row {row - before + 1}"

    def digests(self) -> dict[str, str]:
        return {file.name: digest_of(file, self._text[file.name]) for file in self.files}

    def _read_group(self, group: int) -> Any:
        number, inside = self._groups[group]
        try:
            file = self._parquet.ParquetFile(self.files[number], memory_map=True)
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            return file.read_row_group(inside, columns=columns)
        except Exception as error:  # as above
            raise _no_parquet(self.files[number], error) from error


def _is_media(chunk: Any) -> bool:
    """Whether a column of a row group holds pictures or videos, and not paths of them."""
    root, *inner = chunk.path_in_schema.split(".")
    if root not in ("image", "images", "video"):
        return False
    longest_path = 4096  # bytes
    mean = chunk.total_uncompressed_size / max(1, chunk.num_values)
    return inner[-1:] == ["bytes"] or mean > longest_path


def _range_of(chunk: Any) -> tuple[int, int]:
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return min(o for o in offsets if o is not None), chunk.total_compressed_size


def _no_parquet(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"Cannot read the Parquet file {path}: {reason}; copy or download it again.")
