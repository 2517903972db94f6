"""What data a run was trained on, so that one that is continued on other data is told.

    Samples --fingerprint--> names, samples, sizes and content of the data files, sizes of images
    that of a checkpoint, that of now --changes--> what is different, in words

Of data files the text is read, of images and videos only how large the files are, of up to
`PICTURES` of them: nothing is decoded. What is in Parquet, Arrow and ArrayRecord files and in tar
shards beside text is known by its size alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llava_mini_jax.data.digits.glyphs import load_scans
from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.data.sets import llava_format
from llava_mini_jax.data.sets.sources import Part, Samples
from llava_mini_jax.errors import InputError

PICTURES = 256  # of a data set
_TOGETHER = 16


def fingerprint(source: Samples | DigitsPages) -> dict[str, Any]:
    """{name of a data set: {"samples", "files", "pictures"}}, as JSON keeps it."""
    if isinstance(source, DigitsPages):
        scans, labels = load_scans(source.config.split)
        digest = hashlib.sha256(scans.tobytes() + np.asarray(labels, np.int64).tobytes())
        files = {"scans": [scans.nbytes, digest.hexdigest()]}
        return {source.dataset_of(0): {"samples": len(source), "files": files, "pictures": {}}}
    return {part.name: _of_part(part) for part in source.parts}


def of_files(fingerprint: Mapping[str, Any]) -> str:
    """A digest of the data files alone, which all processes of a run must have alike."""
    files = {name: [part["samples"], part["files"]] for name, part in fingerprint.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different, a clause each; [] where nothing is."""
    found = [f"the data set {name} is gone" for name in before if name not in now]
    for name, part in now.items():
        if name not in before:
            found.append(f"the data set {name} is new")
            continue
        found += _changes(name, before[name], part)
    return found


def _changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["samples"] != now["samples"]:
        yield f"{name} has {now['samples']} samples, it had {before['samples']}"
    yield from _gone_and_new("files", before["files"], now["files"])
    for file in before["files"].keys() & now["files"].keys():
        (size, digest), (new_size, new_digest) = before["files"][file], now["files"][file]
        if size != new_size:
            yield f"{file} has {new_size:,} bytes, it had {size:,}"
        elif digest != new_digest:
            yield f"{file} has other content of the same size"
    both = sorted(before["pictures"].keys() & now["pictures"].keys())
    other = [one for one in both if before["pictures"][one] != now["pictures"][one]]
    if other:
        yield f"{len(other)} of {len(both)} images or videos have other sizes, such as {other[0]}"
    if before["files"] == now["files"]:
        yield from _gone_and_new("images or videos", before["pictures"], now["pictures"])


def _gone_and_new(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for names, problem in (
        (before.keys() - now.keys(), "gone"),
        (now.keys() - before.keys(), "new"),
    ):
        if names:
            yield f"{len(names)} {what} are {problem}, such as {min(names)}"


def _of_part(part: Part) -> dict[str, Any]:
    digests = part.rows.digests()
    try:
        files = {file.name: [file.stat().st_size, digests[file.name]] for file in part.rows.files}
    except OSError as error:
        raise InputError(
            f"Cannot read the data file {error.filename}: {error}; check it."
        ) from error
    return {
        "samples": len(part.chosen),
        "files": files,
        "pictures": dict(_pictures(part)) if part.rows.media_beside else {},
    }


def _pictures(part: Part) -> Iterator[tuple[str, int]]:
    """(path as the data has it, bytes) of images and videos; -1 for what is no file."""
    rows = np.unique(part.chosen)
    looked_at = rows[np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).astype(int)]

    def measured(row: int) -> tuple[str, int] | None:
        try:
            fields = part.rows[row]
            found = llava_format.named(fields) if isinstance(fields, dict) else None
        except InputError:  # the run says so itself
            return None
        return None if found is None else part.images.measured(*found)

    with ThreadPoolExecutor(_TOGETHER) as pool:  # each may be a question to a bucket
        yield from filter(None, pool.map(measured, looked_at.tolist()))
