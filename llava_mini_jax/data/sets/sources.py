"""Data sets on disk as one random-access source of samples in LLaVA's form.

    LLaVA-OneVision's YAML list --yaml_list.py--> Datasets --SourcesConfig--> Samples[i]
                                                                              |
    table of (data set, row): sampling, weight ------- which row? ------------|
    JSON, Parquet, tars ... (row_files.py) ----------- the row ---------------|
    folder, bucket, shards (media_places.py) ---------- its image ------------|
    both together (llava_format.py) ------------------ sample ----------------'
        `Sample` (data/sample.py)

Opening a source reads what it needs to count its rows, and nothing of images and videos. Samples
do not change between accesses and threads, so an order of indices is an order of samples.
"""

import dataclasses
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.data.sets import llava_format
from llava_mini_jax.data.sets.arrayrecord import BuiltRows
from llava_mini_jax.data.sets.data_files import is_pattern
from llava_mini_jax.data.sets.media_places import Folder, Place, open_place
from llava_mini_jax.data.sets.order import GROUPINGS, Groups
from llava_mini_jax.data.sets.row_files import Rows, open_rows
from llava_mini_jax.data.sets.tar_rows import TarRows
from llava_mini_jax.errors import InputError

_SAMPLING = re.compile(r"(first|end|random):(\d{1,15})(%?)")
_PATTERN = re.compile(r"[-_.]*(\{[^}]*\}|[*?]|\[[^]]*\])+")  # data_files.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One data file or folder, and which of its samples to use.

    Raises InputError for an invalid sampling or weight.
    """

    path: str  # a data file, its URL, a folder, or shards such as "shards-{000..099}.tar"
    # What image and video paths are relative to: a folder, its URL, or .tar shards as in `path`;
    # "": the data file's own folder, or the shards that the rows come from.
    images: str = ""
    sampling: str = "all"  # or LLaVA-OneVision's "first:1000", "end:50%", "random:10%"
    weight: float = 1.0  # how many times each sample appears in an epoch; 0.5: a random half

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
    """The data sets of a stage, in order, and how their videos are sampled."""

    datasets: tuple[Dataset, ...]
    video: FrameSampling
    seed: int = 0  # of "random" sampling and of fractional weights
    grouping: str = "none"  # which samples share a batch; or "modality", "modality_length"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise InputError("A SourcesConfig has no datasets; give at least one.")
        if self.seed < 0:
            raise InputError(f"The seed of a SourcesConfig is {self.seed}; it must be 0 or more.")
        if self.grouping not in GROUPINGS:
            raise InputError(
                f'The grouping of a SourcesConfig is "{self.grouping}"; use one of'
                f" {', '.join(GROUPINGS)}."
            )


def unweighted(config: SourcesConfig) -> SourcesConfig:
    """The same samples, each once."""
    once = tuple(dataclasses.replace(dataset, weight=1.0) for dataset in config.datasets)
    return dataclasses.replace(config, datasets=once)


# --- Samples --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """An opened data set."""

    name: str  # of the file, with a number where two are alike
    dataset: Dataset
    images: Place
    rows: Rows
    chosen: np.ndarray  # int64 [n]: the row of each of its samples


class Samples:
    """The samples of all data sets, as `pipeline.Source` wants them.

    An image is a path or the bytes of a file, a video `Frames`; `kind` is the name of the data
    set. Conversations are checked where they are encoded; rows that are no sample raise InputError
    when they are read.
    """

    def __init__(self, config: SourcesConfig):
        self.config = config
        self.parts: list[Part] = []
        for dataset in config.datasets:
            stem = _stem(dataset.path)
            known = {part.name for part in self.parts}
            names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(known) + 2))
            self.parts.append(_open(dataset, next(n for n in names if n not in known), config.seed))
        self._ends = np.cumsum([len(part.chosen) for part in self.parts])

    def __repr__(self) -> str:
        return f"Samples({self.config!r})"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> Sample:
        part, row = self.locate(index)
        place = part.rows.place(row)
        fields = part.rows[row]
        if not isinstance(fields, dict):
            raise InputError(
                f'{place} is {fields!r:.60}; expected a sample {{"id", "conversations", ...}}.'
                " Correct or remove it."
            )
        media = llava_format.media(fields, part.images, self.config.video, place)
        return {
            "id": _id(fields, part, row),
            **media,
            "conversations": llava_format.conversations(fields, "frames" in media, place),
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
        return _id(_fields(part, row), part, row)

    def dataset_of(self, index: SupportsIndex) -> str:
        return self.locate(index)[0].name

    def groups(self) -> Groups:
        """Modality and words of every sample, for a grouped order; reads every chosen row once.

        Files of images and videos are not opened. What cannot be read counts as text of no words.
        """
        found = []
        for part in self.parts:
            if isinstance(part.rows, BuiltRows):  # knows, and reading its images would take long
                found.append(part.rows.groups[part.chosen])
                continue
            rows, where = np.unique(part.chosen, return_inverse=True)
            told = (llava_format.group(_fields(part, int(row))) for row in rows)
            found.append(np.fromiter(told, np.dtype((np.int32, 2)), len(rows))[where])
        modality, words = np.concatenate(found).T
        return Groups(modality.astype(np.int8), words)


def _stem(place: str) -> str:
    """What a data set is called by its file: "page" of "page-{000..127}.tar"."""
    path = Path(place)  # of a URL only its name is looked at
    if not is_pattern(place):
        return (path.name if path.is_dir() else path.stem) or "data"
    return _PATTERN.sub("", path.stem) or path.parent.name or "data"


def _fields(part: Part, row: int) -> Any:
    """None where the row cannot be read."""
    try:
        return part.rows[row]
    except InputError:
        return None


def _id(fields: Any, part: Part, row: int) -> str | int:
    given = fields.get("id") if isinstance(fields, dict) else None
    if isinstance(given, str | int) and given != "":
        return given
    return f"{part.name}-{row}"


# --- Which rows -----------------------------------------------------------------------------------


def _open(dataset: Dataset, name: str, seed: int) -> Part:
    rows = open_rows(dataset.path)
    if dataset.images:
        images = open_place(dataset.images, dataset.path)
    elif isinstance(rows, TarRows):
        images = rows.shards
    elif os.path.isdir(dataset.path):
        images = Folder(Path(dataset.path))
    else:  # of a URL too
        own = os.path.dirname(str(rows.files[0]))
        images = open_place(own or ".", dataset.path)
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
