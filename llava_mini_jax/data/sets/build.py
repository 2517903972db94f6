"""Data sets as ArrayRecord folders, for training on many machines: no small files to open.

    Samples --check and read media, in threads--> Packed --> temporary folder --rename--> OUT
                  '--> rejected: none is allowed, or all are listed in OUT/rejected.jsonl

One data set becomes OUT itself. A list of them becomes OUT/NAME for each, and OUT/mixture.yaml with
their weights, which is read as the list was. `sampling` has happened then; weights have not.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax.data.media.video import PICTURE_SUFFIXES
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.data.sets.arrayrecord import Packed, PackedVideo, write_folder
from llava_mini_jax.data.sets.audit import Verdict, check_sample, in_order
from llava_mini_jax.data.sets.llava_format import Frames
from llava_mini_jax.data.sets.sources import Part, Samples, SourcesConfig, unweighted
from llava_mini_jax.errors import InputError

SAMPLES_A_SHARD = 4096
LIST = "mixture.yaml"


class Built(NamedTuple):
    """What a build came to."""

    samples: dict[str, int]  # of each data set
    rejected: list[dict[str, Any]]  # id, dataset, place, reason


def build(
    config: SourcesConfig,
    out: Path | str,
    *,
    as_list: bool,
    shards: int | None,
    workers: int,
    skip_rejected: bool,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Built:
    """Writes the samples that `config` chooses, each once whatever its weight.

    as_list: a folder for each data set and a list of them, or one data set alone. shards: at most
    so many files of each data set; None makes one of every 4096 samples. Without `skip_rejected`,
    broken samples leave no folder at all. Raises InputError for data sets that cannot be opened and
    an `out` that exists already.
    """
    out = Path(out)
    _check_arguments(out, shards, workers)
    samples = Samples(unweighted(config))
    assert as_list or len(samples.parts) == 1
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.building-", dir=out.parent))
    try:
        with contextlib.closing(in_order(_Packer(samples), len(samples), workers)) as verdicts:
            folders = {part.name: work / part.name if as_list else work for part in samples.parts}
            built = _write(samples, folders, verdicts, shards, progress, keep=skip_rejected)
        if built.rejected and not skip_rejected:
            return Built(dict.fromkeys(built.samples, 0), built.rejected)
        if empty := [name for name, count in built.samples.items() if not count]:
            raise InputError(f"All samples of {empty[0]} are rejected; nothing is built.")
        if built.rejected:
            lines = (json.dumps(line) + "\n" for line in built.rejected)
            (work / "rejected.jsonl").write_text("".join(lines))
        if as_list:
            (work / LIST).write_text(_list(config, samples.parts))
        work.chmod(0o755)  # mkdtemp's own is for secrets
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return built


def _check_arguments(out: Path, shards: int | None, workers: int) -> None:
    if workers < 1 or (shards is not None and shards < 1):
        raise InputError(f"{workers} workers, {shards} shards: each must be 1 or more.")
    if os.path.lexists(out) or not out.parent.is_dir():
        problem = "exists already" if os.path.lexists(out) else "has no parent folder"
        raise InputError(f"The folder {out} {problem}; give another --out.")


def _write(
    samples: Samples,
    folders: dict[str, Path],
    verdicts: Iterator[tuple[int, Verdict, Packed | None]],
    shards: int | None,
    progress: Callable[[int, int], None],
    *,
    keep: bool,
) -> Built:
    """Every data set into its folder; without `keep`, up to the first rejected sample."""
    built = Built({}, [])
    for part in samples.parts:
        folders[part.name].mkdir(exist_ok=True)
        chosen = _good(part, verdicts, len(samples), built.rejected, progress, keep=keep)
        a_shard = SAMPLES_A_SHARD if shards is None else -(-len(part.chosen) // shards)
        built.samples[part.name] = write_folder(folders[part.name], part.name, chosen, a_shard)
    return built


class _Packer:
    """A sample's verdict and, if it is good, what is stored of it."""

    def __init__(self, samples: Samples):
        self._samples = samples
        self._groups = samples.groups()

    def __call__(self, index: int) -> tuple[int, Verdict, Packed | None]:
        verdict = check_sample(self._samples, index)
        if verdict.reason:
            return index, verdict, None
        sample = self._samples[index]
        try:
            media = _media(sample)
        except OSError as error:
            return index, Verdict(verdict.id, "", f"{error}"), None
        modality, words = (int(values[index]) for values in self._groups)
        packed = Packed(sample["id"], sample["conversations"], media, (modality, words))
        return index, verdict, packed


def _media(sample: Sample) -> bytes | PackedVideo | None:
    if "image" in sample:
        image = sample["image"]
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    if "frames" not in sample:
        return None
    frames = sample["frames"]
    assert isinstance(frames, Frames)
    if isinstance(frames.video, PackedVideo):
        return frames.video
    path = Path(frames.video)
    if not path.is_dir():
        return PackedVideo((path.name,), (path.read_bytes(),), False)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES)
    files = [file for file in files if not file.name.startswith(".")]
    return PackedVideo(tuple(f.name for f in files), tuple(f.read_bytes() for f in files), True)


def _good(
    part: Part,
    verdicts: Iterator[tuple[int, Verdict, Packed | None]],
    total: int,
    rejected: list[dict[str, Any]],
    progress: Callable[[int, int], None],
    *,
    keep: bool,
) -> Iterator[Packed]:
    """The part's good samples; the others go to `rejected`, and end the writing without `keep`."""
    for row in part.chosen:
        index, verdict, packed = next(verdicts)
        progress(index + 1, total)
        if packed is None:
            names = {"id": verdict.id, "dataset": part.name, "place": part.rows.place(int(row))}
            rejected.append({**names, "reason": verdict.reason})
        elif keep or not rejected:
            yield packed


def _list(config: SourcesConfig, parts: list[Part]) -> str:
    import yaml

    entries = [
        {"json_path": part.name, "weight": dataset.weight}
        for part, dataset in zip(parts, config.datasets, strict=True)
    ]
    return yaml.safe_dump({"datasets": entries}, sort_keys=False)
