"""Data sets on disk as one random-access source of samples in LLaVA's form.

    LLaVA-OneVision's YAML list --read_list--> Datasets --SourcesConfig--> Samples[i]
                                                                              |
    table of (data set, row): sampling, weight ------- which row? ------------|
    JSON list | JSON Lines | Parquet ----------------- the row ---------------|
    row + folder of pictures ------------------------- sample ----------------'
        {"id", "image" | "frames" | neither, "conversations", "kind"}

Opening a source reads what it needs to count its rows, and nothing of pictures and videos. Samples
do not change between accesses and threads, so an order of indices is an order of samples.
"""

import dataclasses
import functools
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np

from llava_mini_jax.data.conversation import IMAGE_MARK
from llava_mini_jax.data.video import FrameSampling, read_video
from llava_mini_jax.errors import InputError

VIDEO_MARK = "<video>"  # of Video-ChatGPT's conversations, where LLaVA writes "<image>"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".flv")
_SAMPLING = re.compile(r"(first|end|random):(\d{1,15})(%?)")
_COLUMNS = ("id", "image", "images", "video", "conversations", "q", "a", "video_id")
_SCAN_BYTES = 2**24
_SHORT_LINE = 64  # only lines up to here are looked at for being blank; no sample is as short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One data file, or a folder of Parquet files, and what is taken of it.

    Raises InputError for a sampling or weight that means nothing.
    """

    path: str  # .json, .jsonl, .parquet, or a folder of .parquet files
    images: str = ""  # folder that picture and video paths are relative to; "": the data file's own
    sampling: str = "all"  # or LLaVA-OneVision's "first:1000", "end:50%", "random:10%"
    weight: float = 1.0  # how many times each sample stands in an epoch; 0.5: a random half of them

    def __post_init__(self) -> None:
        if self.sampling != "all" and not _SAMPLING.fullmatch(self.sampling):
            raise InputError(
                f'{self.path}: the sampling is "{self.sampling}"; use "all", or "first", "end" or'
                ' "random" with a number or percentage, such as "random:10%".'
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{self.path}: the weight is {self.weight}; it must be above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """The data sets of a stage, one after the other, and how their videos are read."""

    datasets: tuple[Dataset, ...]
    fps: float  # frames a second of a video
    max_frames: int  # of one video; longer ones are spread over their whole length
    seed: int = 0  # of "random" samplings and of fractions of a weight

    def __post_init__(self) -> None:
        if not self.datasets:
            raise InputError("A SourcesConfig has no datasets; give at least one.")
        if self.seed < 0:
            raise InputError(f"The seed of a SourcesConfig is {self.seed}; it must be 0 or more.")
        self.frame_sampling()

    def frame_sampling(self) -> FrameSampling:
        return FrameSampling(fps=self.fps, max_frames=self.max_frames)


def read_list(path: Path | str, images: str = "") -> tuple[Dataset, ...]:
    """The data sets of a LLaVA-OneVision YAML list.

    datasets:
      - json_path: captions.json       # relative to the YAML file
        sampling_strategy: first:10%   # optional
        image_folder: coco             # optional, as `weight` is; these two keys are ours

    images: folder for the entries that name none. Raises InputError for any other shape or key.
    """
    import yaml

    path = _existing(path)
    try:
        content = yaml.safe_load(path.read_bytes())
    except Exception as error:  # its constructors raise almost anything on damaged files
        reason = " ".join(str(error).split())
        raise InputError(f"Cannot read the list {path}: no YAML ({reason}); correct it.") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'The list {path} has no entries under "datasets"; expected "datasets:" and below it'
            ' lines such as "- json_path: captions.json".'
        )
    return tuple(_listed(entry, i + 1, path, images) for i, entry in enumerate(entries))


def _listed(entry: Any, number: int, path: Path, images: str) -> Dataset:
    kinds: dict[str, Any] = {
        "json_path": str,
        "sampling_strategy": str,
        "image_folder": str,
        "weight": int | float,
    }
    fields = entry if isinstance(entry, dict) else {}
    wrong = [k for k, v in fields.items() if k not in kinds or not isinstance(v, kinds[k])]
    if wrong or "json_path" not in fields:
        raise InputError(
            f'{path}: entry {number} is {entry!r:.80}; expected "json_path" and at most'
            f" {', '.join(list(kinds)[1:])}. Correct the entry."
        )
    folder = fields.get("image_folder")
    return Dataset(
        path=str(path.parent / fields["json_path"]),
        images=images if folder is None else str(path.parent / folder),
        sampling=fields.get("sampling_strategy", "all"),
        weight=float(fields.get("weight", 1)),
    )


# --- Samples --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of a video, uint8 [H, W, 3] each, decoded one by one whenever they are iterated.

    Not an array: an hour of video would be gigabytes before it is made small.
    """

    path: str
    sampling: FrameSampling

    def __iter__(self) -> Iterator[np.ndarray]:
        return read_video(self.path, self.sampling)


class Part(NamedTuple):
    """An opened data set."""

    name: str  # of the file, with a number where two are alike
    dataset: Dataset
    images: Path
    rows: "_Rows"
    chosen: np.ndarray  # int64 [n]: the row of each of its samples


class Samples:
    """The samples of all data sets, as `pipeline.Source` wants them.

    A sample is {"id", "conversations", "kind"} and one of "image" (a path, or bytes of a picture),
    "frames" (`Frames`), or neither for text. `kind` is the name of its data set. Conversations are
    checked where they are encoded; rows that are no sample raise InputError when they are read.
    """

    def __init__(self, config: SourcesConfig):
        self.config = config
        self.parts: list[Part] = []
        for dataset in config.datasets:
            stem = Path(dataset.path).stem or "data"
            known = {part.name for part in self.parts}
            names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(known) + 2))
            self.parts.append(_open(dataset, next(n for n in names if n not in known), config.seed))
        self._ends = np.cumsum([len(part.chosen) for part in self.parts])

    def __repr__(self) -> str:
        return f"Samples({self.config!r})"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        part, row = self.locate(index)
        place = part.rows.place(row)
        fields = part.rows[row]
        if not isinstance(fields, dict):
            raise InputError(
                f'{place} is {fields!r:.60}; expected a sample {{"id", "conversations", ...}}.'
                " Correct or remove it."
            )
        media = self._media(fields, part, place)
        return {
            "id": _id(fields, part, row),
            **media,
            "conversations": _conversations(fields, "frames" in media, place),
            "kind": part.name,
        }

    def locate(self, index: SupportsIndex) -> tuple[Part, int]:
        """The data set that a sample comes from, and its row there, counted from 0."""
        number = index.__index__()
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        which = int(np.searchsorted(self._ends, number, side="right"))
        part = self.parts[which]
        return part, int(part.chosen[number - int(self._ends[which])])  # counted from its end

    def id_of(self, index: SupportsIndex) -> str | int:
        """The id, also of what cannot be read: then the data set's name and the row."""
        part, row = self.locate(index)
        try:
            fields = part.rows[row]
        except InputError:
            fields = None
        return _id(fields, part, row)

    def _media(self, fields: dict[str, Any], part: Part, place: str) -> dict[str, Any]:
        keys = ("image", "images", "video", *["video_id"] * ("q" in fields))
        given = {key: found for key in keys if (found := _single(fields, key, place)) is not None}
        if len(given) > 1:
            raise InputError(
                f"{place} has {' and '.join(given)}; a sample has one picture or one video. Remove"
                " what does not belong to it."
            )
        for key, value in given.items():
            if isinstance(value, bytes) and key.startswith("image"):
                return {"image": value}
            if not isinstance(value, str):
                raise InputError(
                    f'{place}: its "{key}" is {value!r:.60}; expected a path relative to'
                    f" {part.images}. Correct or remove the sample."
                )
            if key.startswith("image"):
                return {"image": str(part.images / value)}
            sampling = self.config.frame_sampling()
            return {"frames": Frames(_find_video(part.images, value, place), sampling)}
        return {}


def _id(fields: Any, part: Part, row: int) -> str | int:
    given = fields.get("id") if isinstance(fields, dict) else None
    if isinstance(given, str | int) and given != "":
        return given
    return f"{part.name}-{row}"


def _single(fields: dict[str, Any], key: str, place: str) -> Any:
    """The one picture or video under `key`: a path, bytes, or None where there is none."""
    value = fields.get(key)
    if isinstance(value, list):
        if len(value) > 1:
            raise InputError(
                f'{place}: its "{key}" are {len(value)}; training takes one picture or video a'
                " sample. Split or remove the sample."
            )
        value = value[0] if value else None
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:  # of the Hugging Face hub
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return None if value == "" else value


def _find_video(folder: Path, name: str, place: str) -> str:
    """The file; Video-ChatGPT's ids have no suffix, so then whichever the file has."""
    path = str(folder / name)
    for candidate in (path, *(path + suffix for suffix in VIDEO_SUFFIXES)):
        if os.path.exists(candidate):  # unlike Path.exists, False for names that cannot be
            return candidate
    raise InputError(
        f"{place}: there is no video {path!r}, with or without one of {', '.join(VIDEO_SUFFIXES)};"
        " copy it there or remove the sample."
    )


def _conversations(fields: dict[str, Any], is_video: bool, place: str) -> Any:
    """LLaVA's list of turns; what is wrong inside of it is for `from_llava` to say."""
    if "conversations" in fields:
        turns = fields["conversations"]
    elif isinstance(fields.get("q"), str) and isinstance(fields.get("a"), str):
        question = f"{IMAGE_MARK}\n{fields['q']}" if is_video else fields["q"]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": fields["a"]}]
    else:
        raise InputError(
            f'{place} has no "conversations" (nor texts "q" and "a"), but'
            f" {', '.join(map(repr, fields))[:80] or 'nothing'}; correct or remove it."
        )
    if not isinstance(turns, list):
        return turns
    checked = []
    for turn in turns:
        text = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can write halves of letters: "\ud800"
                raise InputError(
                    f"{place}: a turn has half of a surrogate pair ({error.reason}), which no"
                    " tokenizer reads; correct or remove the sample."
                ) from error
            if is_video:
                turn = {**turn, "value": text.replace(VIDEO_MARK, IMAGE_MARK)}
        checked.append(turn)
    return checked


# --- Which rows -----------------------------------------------------------------------------------


def _open(dataset: Dataset, name: str, seed: int) -> Part:
    rows = _open_rows(Path(dataset.path))
    if dataset.images and not os.path.isdir(dataset.images):
        raise InputError(
            f"{dataset.path}: its folder of pictures {dataset.images} does not exist or is no"
            " folder; give the folder that the paths in the data file are relative to."
        )
    file = Path(dataset.path)
    images = Path(dataset.images) if dataset.images else file if file.is_dir() else file.parent
    return Part(name, dataset, images, rows, _choose(dataset, len(rows), [seed, _crc(name)]))


def _crc(name: str) -> int:
    return zlib.crc32(name.encode(errors="surrogatepass"))


def _choose(dataset: Dataset, total: int, seed: list[int]) -> np.ndarray:
    """int64 [n]: rows in the file's order, once for each whole weight; percentages round up."""
    rng = np.random.default_rng(seed)
    rows = np.arange(total)
    if match := _SAMPLING.fullmatch(dataset.sampling):
        number = int(match[2])
        count = min(total, -(-number * total // 100) if match[3] else number)
        if match[1] == "random":
            rows = np.sort(rng.permutation(total)[:count])
        else:
            rows = rows[:count] if match[1] == "first" else rows[total - count :]
    whole = int(dataset.weight)
    rest = np.sort(rng.permutation(rows)[: round((dataset.weight - whole) * len(rows))])
    chosen = np.concatenate([*[rows] * whole, rest])
    if not len(chosen):
        raise InputError(
            f'{dataset.path}: sampling "{dataset.sampling}" and weight {dataset.weight} leave none'
            f" of its {total} samples; take more, or leave the data set out."
        )
    return chosen


# --- Formats --------------------------------------------------------------------------------------


class _Rows(Protocol):
    """A file's rows, parsed; `row[i]` raises InputError where it cannot be."""

    files: Sequence[Path]

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...
    def place(self, row: int) -> str:
        """Where a row stands, as an editor counts."""
        ...


def _existing(path: Path | str) -> Path:
    if not os.path.isfile(path):
        problem = "it is not a file" if os.path.exists(path) else "there is no such file"
        raise InputError(f"Cannot open the data file {path}: {problem}; check the path.")
    return Path(path)


def _open_rows(path: Path) -> _Rows:
    kinds: dict[str, Any] = {".json": _JsonList, ".jsonl": _JsonLines, ".parquet": _Parquet}
    if os.path.isdir(path):
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise InputError(
                f"The folder {path} holds no .parquet files; give a data file"
                f" ({', '.join(kinds)}) or a folder of Parquet files."
            )
        rows: _Rows = _Parquet(files)
    else:
        path = _existing(path)
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


class _JsonLines:
    """A sample a line. The file is mapped, 16 bytes a line are held; lines are parsed when read."""

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
        for number, file in enumerate(files):
            try:
                metadata = parquet.read_metadata(file)
            except Exception as error:  # pyarrow has no common base for what damaged files raise
                raise _no_parquet(file, error) from error
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

    def _read_group(self, group: int) -> Any:
        number, inside = self._groups[group]
        try:
            file = self._parquet.ParquetFile(self.files[number], memory_map=True)
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            return file.read_row_group(inside, columns=columns)
        except Exception as error:  # as above
            raise _no_parquet(self.files[number], error) from error


def _no_parquet(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"Cannot read the Parquet file {path}: {reason}; copy or download it again.")
