"""The rows of Arrow's files: Parquet as on the Hugging Face hub, folders that `datasets` saved.

    *.parquet          --ParquetRows--> a row group is read, the last few are kept --> row
    FOLDER/state.json
    FOLDER/data-*.arrow --SavedRows--> mapped record batches, each checked once --> row

Columns that this package knows are read (llava_format.py), images inside or beside the files.
`datasets` itself is not needed: its folders are Arrow's stream format and two files of JSON.
"""

import functools
import hashlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.data.sets.data_files import (
    DataFile,
    Remote,
    digest_of,
    one_line,
    parse_json,
    read_range,
)
from llava_mini_jax.data.sets.llava_format import COLUMNS, MEDIA, SAID
from llava_mini_jax.errors import InputError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as the hub names files
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was written to its end


def _columns(names: Sequence[str], file: DataFile) -> list[str]:
    """Those that are read; InputError where no conversation is among them."""
    known = [name for name in COLUMNS if name in names]
    if not set(known) & set(SAID):
        raise InputError(
            f"{file} has the columns {', '.join(map(repr, names))[:200] or '(none)'}; expected"
            f" {' or '.join(SAID)}, and {' or '.join(MEDIA)} beside. Rename its columns."
        )
    return known


# --- Parquet --------------------------------------------------------------------------------------


def _check_one_split(files: Sequence[DataFile]) -> None:
    """Raises InputError for files of several splits of the hub: one is not for training."""
    splits = {found[1] for file in files if (found := _SPLIT.fullmatch(file.name))}
    if len(splits) > 1:
        folder = posixpath.dirname(str(files[0]))
        raise InputError(
            f"The folder {folder} holds the splits {', '.join(sorted(splits))}; name one of them,"
            f" such as {folder}/{max(splits)}-*.parquet."
        )


class ParquetRows:
    """Parquet files as on the Hugging Face hub, images inside or beside them.

    A row group is the smallest piece that can be read, so the last few are kept.
    """

    def __init__(self, files: Sequence[DataFile]):
        import pyarrow.parquet as parquet

        _check_one_split(files)
        self.files = files
        self._parquet = parquet
        self._metadata: list[Any] = []
        groups: list[tuple[int, int]] = []  # file, row group
        sizes: list[int] = []
        self._text: dict[str, list[tuple[int, int]]] = {}  # ranges of each file without images
        self.media_beside = True
        for number, file in enumerate(files):
            try:
                metadata = parquet.read_metadata(_opened(file))
                names = metadata.schema.to_arrow_schema().names
                in_groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
                chunks = [g.column(c) for g in in_groups for c in range(metadata.num_columns)]
                text = [_range_of(chunk) for chunk in chunks if not _is_media(chunk)]
            except Exception as error:  # pyarrow has no common base for what damaged files raise
                raise _damaged(file, "Parquet", error) from error
            _columns(names, file)
            self.media_beside &= len(text) == len(chunks)
            end = file.stat().st_size
            self._text[file.name] = [*text, (max(0, end - metadata.serialized_size - 8), end)]
            self._metadata.append(metadata)
            groups += [(number, group) for group in range(len(in_groups))]
            sizes += [group.num_rows for group in in_groups]
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
        path, metadata = self.files[number], self._metadata[number]
        try:
            file = self._parquet.ParquetFile(
                _opened(path), metadata=metadata, memory_map=True, page_checksum_verification=True
            )
            names = _columns(file.schema_arrow.names, path)
            table = file.read_row_group(inside, columns=names)
            table.validate(full=True)
        except Exception as error:  # as above
            raise _damaged(path, "Parquet", error) from error
        expected = metadata.row_group(inside).num_rows
        if table.num_rows != expected:
            raise _damaged(path, "Parquet", ValueError(f"{table.num_rows} rows of {expected}"))
        return table


def _opened(file: DataFile) -> Any:
    return file.open() if isinstance(file, Remote) else file


def _is_media(chunk: Any) -> bool:
    """Whether a column of a row group holds images or videos, and not paths of them."""
    root, *inner = chunk.path_in_schema.split(".")
    if root not in MEDIA:
        return False
    longest_path = 4096  # bytes
    mean = chunk.total_uncompressed_size / max(1, chunk.num_values)
    return inner[-1:] == ["bytes"] or mean > longest_path


def _range_of(chunk: Any) -> tuple[int, int]:
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return min(o for o in offsets if o is not None), chunk.total_compressed_size


def _damaged(path: DataFile, kind: str, error: Exception) -> InputError:
    return InputError(
        f"Cannot read the {kind} file {path}: {one_line(error)}; copy or download it again."
    )


# --- Folders that `datasets` saved ----------------------------------------------------------------


def is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in (_STATE, _SPLITS)) or any(
        folder.glob("*.arrow")
    )


class SavedRows:
    """A `Dataset` that `save_to_disk` wrote. Files are mapped: only what is read is in memory."""

    def __init__(self, folder: Path):
        self.files: Sequence[DataFile] = _saved_files(folder)
        self._batches: list[Any] = []
        self._first: list[int] = []  # of each file: the number of its first batch
        for file in self.files:
            self._first.append(len(self._batches))
            self._batches += _read_stream(file)
        sizes = np.array([batch.num_rows for batch in self._batches], np.int64)
        self._ends = np.cumsum(sizes)
        self._checked: set[int] = set()
        types = {field.name: field.type for batch in self._batches[:1] for field in batch.schema}
        self.media_beside = not any(_holds_bytes(types[n]) for n in MEDIA if n in types)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Any:
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        try:
            if number not in self._checked:
                batch.validate(full=True)  # a wrong offset would be read from anywhere in memory
                self._checked.add(number)
            start = row - int(self._ends[number]) + batch.num_rows
            return batch.slice(start, 1).to_pylist()[0]
        except Exception as error:  # as above
            raise InputError(
                f"{self.place(row)}: {one_line(error)}; the file is damaged, copy or save it again."
            ) from error

    def place(self, row: int) -> str:
        batch = int(np.searchsorted(self._ends, row, side="right"))
        file = int(np.searchsorted(self._first, batch, side="right")) - 1
        first = self._first[file]
        before = int(self._ends[first - 1]) if first else 0
        return f"{self.files[file]}, row {row - before + 1}"

    def digests(self) -> dict[str, str]:
        firsts = [*self._first, len(self._batches)]
        return {
            file.name: _digest(self._batches[first:end])
            for file, first, end in zip(self.files, firsts, firsts[1:], strict=False)
        }


def _saved_files(folder: Path) -> list[DataFile]:
    """In their order, by state.json; InputError for what is more than these files."""
    if (folder / _SPLITS).exists():
        found = parse_json((folder / _SPLITS).read_bytes(), f"{folder / _SPLITS}", "splits")
        splits = found.get("splits") if isinstance(found, dict) else None
        told = ", ".join(map(str, splits)) if isinstance(splits, list) else "(none named)"
        raise InputError(f"{folder} holds the splits {told}; give one of them, {folder}/SPLIT.")
    path = folder / _STATE
    if not path.exists():  # as `load_dataset` keeps what it has downloaded
        raise InputError(
            f"{folder} holds Arrow files without {_STATE}; write it again by save_to_disk(...)."
        )
    state = parse_json(path.read_bytes(), str(path), "the state of a saved data set")
    if not isinstance(state, dict):
        raise InputError(f"{path} is {state!r:.60}; expected the state of a saved data set.")
    for name in ("_indices_data_files", "_indices_files", "_format_columns"):
        # A selection or an order of rows, or a view of columns, as earlier versions kept them.
        if state.get(name):
            raise InputError(
                f"{path} has {name}, which is not read; save the data set again, by"
                " flatten_indices().with_format(None).save_to_disk(...)."
            )
    listed = state.get("_data_files")
    names = [f.get("filename") if isinstance(f, dict) else None for f in listed or ()]
    if not names or not all(isinstance(n, str) and n and Path(n).name == n for n in names):
        raise InputError(
            f'{path} has _data_files {listed!r:.80}; expected names such as "data-00000-of-00001'
            '.arrow". Save the data set again.'
        )
    files = [folder / str(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder} lacks {', '.join(missing[:3])}; copy or save it again.")
    return list(files)


def _read_stream(file: DataFile) -> list[Any]:
    """The record batches of an Arrow stream, with the columns that are read; nothing is copied."""
    import pyarrow
    from pyarrow import ipc

    size = file.stat().st_size
    if read_range(file, size - len(_END), size) != _END:
        # Without its end a stream that was cut between two batches would be a shorter data set.
        raise _damaged(file, "Arrow", ValueError("its end does not match its beginning"))
    try:
        with pyarrow.memory_map(str(file)) as mapped, ipc.open_stream(mapped) as stream:
            names, batches = stream.schema.names, list(stream)
    except Exception as error:  # as above
        raise _damaged(file, "Arrow", error) from error
    known = _columns(names, file)
    return [batch.select(known) for batch in batches]


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _digest(batches: Sequence[Any]) -> str:
    """SHA-256 of the columns that hold no images."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.num_rows.to_bytes(8, "little"))
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not (name in MEDIA and _holds_bytes(column.type)):
                digest.update(name.encode())
                for content in _buffers(column):
                    digest.update(content)
    return digest.hexdigest()


def _buffers(column: Any) -> Iterator[Any]:
    for content in column.buffers():
        # None: no value is missing, which is another thing than an empty buffer.
        yield b"\0" if content is None else content
