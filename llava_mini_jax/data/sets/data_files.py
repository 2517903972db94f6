"""Data files where people keep them: on disk, or in a bucket that fsspec reads.

    "mix.json"                       --existing_file--> Path
    "gs://bucket/mix.json"           --existing_file--> Remote
    "shards/page-{000..127}.tar"     --matching--> the files, in the order of their names
    file --read_range, digest_of--> some of its bytes, SHA-256 of what is in it

A `Remote` has as much of a Path's face as data sets need, so that what reads files knows of no
buckets. Which kinds there are (gs, s3, az, hf ...) is for fsspec and its packages to say.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_mini_jax.errors import InputError, LostError

_SCAN_BYTES = 2**24
_TOGETHER = 16
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as WebDataset writes the numbers of shards
_MOST_FILES = 1_000_000
# What reads them in this project's extras; others are known to fsspec.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file in a bucket."""

    fs: Any  # of fsspec
    path: str  # as `fs` names it
    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1]

    def open(self, mode: str = "rb") -> Any:
        return self.fs.open(self.path, mode)

    def stat(self) -> Any:
        return SimpleNamespace(st_size=self.fs.size(self.path))

    def read_bytes(self) -> bytes:
        return self.fs.cat_file(self.path)


DataFile = Path | Remote


def is_remote(place: Path | str) -> bool:
    return "://" in str(place)


def remote(url: str) -> Remote:
    """What stands behind a URL, looked at by nobody yet. InputError where no package reads it."""
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
        fs.invalidate_cache()  # what a listing said earlier in this process may be so no more
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'llava-mini-jax[{extra}]'" if extra else "install that package"
        raise InputError(f"{url} needs one more package ({error}): {remedy}.") from error
    except Exception as error:  # fsspec's kinds have no common base for what they refuse
        raise InputError(
            f"{url} cannot be used ({one_line(error)}); give a URL that fsspec knows, such as"
            " gs://bucket/folder, or a local path."
        ) from error
    return Remote(fs, path, url)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def cannot_read(file: DataFile | str, error: Exception) -> InputError:
    more = " and your access to the bucket" if is_remote(str(file)) else ""
    return InputError(f"Cannot read the data file {file}: {one_line(error)}; check it{more}.")


# --- Which files ----------------------------------------------------------------------------------


def existing_file(path: Path | str) -> DataFile:
    """Raises InputError where there is no such file."""
    if is_remote(path):
        found = remote(str(path))
        try:
            is_file = found.fs.isfile(found.path)
            exists = is_file or found.fs.exists(found.path)
        except Exception as error:  # as above
            raise cannot_read(str(path), error) from error
    else:
        found, is_file, exists = Path(path), os.path.isfile(path), os.path.exists(path)
    if not is_file:
        problem = "it is not a file" if exists else "there is no such file"
        raise InputError(f"Cannot open the data file {path}: {problem}; check the path.")
    return found


def is_pattern(place: Path | str) -> bool:
    """Whether several files may be meant; a file whose name looks like it is meant itself."""
    text = str(place)
    looks = any(mark in text for mark in "*?[") or _RANGE.search(text) is not None
    return looks and (is_remote(place) or not os.path.exists(place))


def matching(place: Path | str) -> list[DataFile]:
    """The files of a path, of "page-{000..127}.tar" (all must be there) or "page-*.tar", in their
    order, which is that of their names for "*". InputError where there are none."""
    named = _numbered(str(place)) if is_pattern(place) else [str(place)]
    with ThreadPoolExecutor(_TOGETHER) as pool:  # each may be a question to a bucket
        files = [file for some in pool.map(files_like, named) for file in some]
    if not files:
        raise InputError(f"There are no files {place}; check the path.")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{place} matches two files named {twice}; rename one of them.")
    return files


def files_like(one: str) -> list[DataFile]:
    """The file of a name without a range, or those of a pattern with a star, of which there may be
    none."""
    if not is_pattern(one):
        return [existing_file(one)]
    if is_remote(one):
        return _listed(one)
    return [Path(path) for path in sorted(glob.glob(one)) if os.path.isfile(path)]


def _numbered(text: str) -> list[str]:
    """All names that the ranges in braces stand for."""
    pieces, numbers = _RANGE.split(text)[::3], []
    for match in _RANGE.finditer(text):
        first, last = match.groups()
        if not int(first) <= int(last) < int(first) + _MOST_FILES:
            raise InputError(f"{text}: {match[0]} is not a range; write the smaller number first.")
        numbers.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
    found = itertools.islice(itertools.product(*numbers), _MOST_FILES)
    return ["".join(itertools.chain(*zip(pieces, chosen, strict=False))) + pieces[-1]
            for chosen in found]  # fmt: skip


def _listed(pattern: str) -> list[DataFile]:
    base = remote(pattern)
    try:
        paths = sorted(base.fs.glob(base.path))
    except Exception as error:  # as above
        raise cannot_read(pattern, error) from error
    return [Remote(base.fs, path, base.fs.unstrip_protocol(path)) for path in paths]


# --- What is in them ------------------------------------------------------------------------------


def read_range(file: DataFile, start: int, end: int) -> bytes:
    """Bytes [start, end), fewer where the file ends before. LostError where it cannot be read."""
    try:
        if isinstance(file, Remote):
            return file.fs.cat_file(file.path, start=start, end=end)
        with file.open("rb") as content:
            content.seek(start)
            return content.read(end - start)
    except Exception as error:  # as above
        raise LostError(
            f"{file} was there and can no longer be read ({one_line(error)}); check it, and start"
            " the same command again."
        ) from error


def digest_of(file: DataFile, ranges: Iterable[tuple[int, int]] | None = None) -> str:
    """SHA-256 of a file, or of its ranges (from, how many bytes); InputError if it is gone."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            for start, left in [(0, file.stat().st_size)] if ranges is None else ranges:
                content.seek(start)
                while left > 0 and (piece := content.read(min(left, _SCAN_BYTES))):
                    digest.update(piece)
                    left -= len(piece)
    except OSError as error:
        raise cannot_read(file, error) from error
    return digest.hexdigest()


def parse_json(content: bytes, place: str, expected: str) -> Any:
    """Raises InputError, with what was `expected` at that `place`, for what is no JSON."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; expected {expected}.") from error
    except ValueError as error:  # broken JSON, broken UTF-8, a number of ten thousand digits
        raise InputError(
            f"{place}: not valid JSON ({error}); expected {expected}. Correct it or copy it again."
        ) from error
