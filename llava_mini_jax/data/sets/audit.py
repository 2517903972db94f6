"""Every sample of a source read once, by the code that training runs, before a run depends on it.

    Samples --check_sample, in threads--> Verdict a sample --in the source's order--> manifest
      read the row -> turns -> one mark an image -> an answer -> decode the image or video

Nothing here needs a tokenizer, a model or JAX. Decoders release Python's lock, so threads are as
fast as processes and share one index. The manifest depends on the files alone: not on the number
of workers, nor on the day.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.sets.order import MODALITIES
from llava_mini_jax.data.sets.sources import Part, Samples, SourcesConfig, unweighted
from llava_mini_jax.data.text import conversation
from llava_mini_jax.errors import InputError
from llava_mini_jax.journal import write_whole

T = TypeVar("T")
_AHEAD = 4  # samples that wait for each worker


class Verdict(NamedTuple):
    """What is said about one sample."""

    id: str | int
    modality: str  # one of MODALITIES; "" where the sample is rejected
    reason: str  # one sentence; "" where the sample is good


def check_sample(samples: Samples, index: int) -> Verdict:
    """Reads, decodes and checks one sample as `pipeline.Encoder` does."""
    try:
        sample = samples[index]
        where = f"sample {sample['id']}"
        turns = conversation.from_llava(sample["conversations"], where)
        modality = "video" if "frames" in sample else "image" if "image" in sample else "text"
        pictures = int(modality != "text")
        turns = conversation.place_image_mark(turns, pictures)
        conversation.check_images(_marks_only(turns), pictures, where)
        if not any(turn.role == "assistant" for turn in turns):
            raise InputError(f"{where}: there is no answer to learn; add one or remove the sample.")
        if "image" in sample:
            load_image(sample["image"])
        for _ in sample.get("frames", ()):
            pass
    except InputError as error:
        return Verdict(samples.id_of(index), "", str(error))
    except Exception as error:  # a fault of the disk or of ours; the other samples still count
        return Verdict(samples.id_of(index), "", f"{type(error).__name__}: {error}")
    return Verdict(sample["id"], modality, "")


def _marks_only(turns: list[conversation.Turn]) -> conversation.EncodedPrompt:
    """What a tokenizer makes of the image marks, the words left out."""
    marks = sum((turn.text or "").count(conversation.IMAGE_MARK) for turn in turns)
    none = np.zeros(marks, bool)
    return conversation.EncodedPrompt(
        np.full(marks, conversation.IMAGE_TOKEN, np.int32), none, none
    )


def audit(
    config: SourcesConfig, *, workers: int, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """The manifest of the samples that `config` chooses, each read once whatever its weight.

    `progress(done, total)` is called after every sample. Keys of the manifest: "video" (which
    frames), "seed", "samples", "rejected" (id, dataset, place and reason of each), and "datasets"
    (name, path, images, sampling, files with their bytes and sha256, rows, samples, rejected,
    modalities).
    Raises InputError for data sets that cannot be opened.
    """
    if workers < 1:
        raise InputError(f"The number of workers is {workers}; it must be 1 or more.")
    samples = Samples(unweighted(config))
    counts = {part.name: collections.Counter[str]() for part in samples.parts}
    rejected: list[dict[str, Any]] = []
    verdicts = in_order(functools.partial(check_sample, samples), len(samples), workers)
    with contextlib.closing(verdicts):
        for index, (sample_id, modality, reason) in enumerate(verdicts):
            part, row = samples.locate(index)
            counts[part.name][modality] += 1
            if reason:
                names = {"id": sample_id, "dataset": part.name, "place": part.rows.place(row)}
                rejected.append({**names, "reason": reason})
            progress(index + 1, len(samples))
    return {
        "video": dataclasses.asdict(config.video),
        "seed": config.seed,
        "samples": len(samples),
        "datasets": [_describe(part, counts[part.name]) for part in samples.parts],
        "rejected": rejected,
    }


def in_order(function: Callable[[int], T], total: int, workers: int) -> Generator[T, None, None]:
    """function(0), function(1), ..., worked out in threads a few ahead at most, so that millions
    need no memory."""
    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[T]] = collections.deque()
    try:
        for index in range(total):
            waiting.append(pool.submit(function, index))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _describe(part: Part, counts: collections.Counter[str]) -> dict[str, Any]:
    files = []
    for path in part.rows.files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"path": str(path), "bytes": path.stat().st_size, "sha256": digest})
    return {
        "name": part.name,
        "path": part.dataset.path,
        "images": str(part.images),
        "sampling": part.dataset.sampling,
        "files": files,
        "rows": len(part.rows),
        "samples": len(part.chosen),
        "rejected": counts[""],
        "modalities": {name: counts[name] for name in MODALITIES},
    }


def check_writable(path: Path | str, configs: Sequence[SourcesConfig]) -> Path:
    """InputError, before hours of work, where a manifest cannot be or would overwrite the data."""
    path = Path(path)
    data = (dataset.path for config in configs for dataset in config.datasets)
    if any(path.resolve() == Path(file).resolve() for file in data):
        raise InputError(f"The report {path} would overwrite the data file; give another path.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"The report {path} cannot be written: it is a folder, or its folder does not exist or"
            " may not be written; give another path."
        )
    return path


def write_manifest(manifest: dict[str, Any], path: Path) -> None:
    """All of it or, if anything interrupts, what was there before."""
    write_whole(path, json.dumps(manifest, indent=2) + "\n")
