"""Tar shards, as GNU tar or WebDataset writes them, read at random.

    "coco-{000..099}.tar" --each header once--> Index: name -> where its bytes begin
                               '--kept in the user's cache folder, while the shard is the same
    Shards.picture("coco/1.jpg") --one ranged read: header and bytes--> bytes, or LostError
                                    where the header is another one: the shard has changed

A tar has no table of contents, so the first opening of a shard goes through it (of one in a bucket:
reads it). Compressed ones cannot be read at random, and are refused.
"""

import contextlib
import hashlib
import itertools
import os
import posixpath
import re
import tarfile
import uuid
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_mini_jax import environment
from llava_mini_jax.data.media import picture_limits
from llava_mini_jax.data.media.video_names import SUFFIXES
from llava_mini_jax.data.sets.arrayrecord import PackedVideo
from llava_mini_jax.data.sets.data_files import (
    DataFile,
    Remote,
    matching,
    one_line,
    read_range,
)
from llava_mini_jax.errors import InputError, LostError

_VERSION = 1  # of the kept index
_HEADER = tarfile.BLOCKSIZE
_MOST_BEHIND = 2**20  # bytes behind the end that are looked at; writers pad to 10 kB
_TOGETHER = 8  # shards that are gone through at a time
_TAR = re.compile(r"\.tar$", re.IGNORECASE)
_PACKED = re.compile(r"\.(tgz|tar\.\w+)$", re.IGNORECASE)


class Index(NamedTuple):
    """The regular files of a shard, in its order."""

    names: list[str]
    starts: np.ndarray  # int64 [n], of the bytes; the header is the block in front of them
    sizes: np.ndarray  # int64 [n]
    heads: np.ndarray  # uint32 [n], CRC-32 of the headers
    digest: str  # SHA-256 of all this, and of what is in the .json files


def is_tar(place: Path | str) -> bool:
    """InputError for a compressed one."""
    if _PACKED.search(str(place)):
        raise InputError(f"{place} is compressed, which cannot be read at random; unpack it.")
    return _TAR.search(str(place)) is not None


# --- The index ------------------------------------------------------------------------------------


def index_of(file: DataFile) -> Index:
    """From the cache if the shard is the one that it was made of. InputError for no whole tar."""
    try:
        kept = _kept_at(file)
        if (index := _load(kept, file.stat().st_size)) is not None:
            return index
        with file.open("rb") as content:
            index = _scan(content, file)
    except InputError:
        raise
    except Exception as error:  # tarfile and buckets' packages have no common base for damage
        raise _damaged(file, one_line(error)) from error
    _keep(kept, index)
    return index


def _scan(content: Any, file: DataFile) -> Index:
    found: list[tuple[str, int, int, int]] = []
    digest, end = hashlib.sha256(), 0
    open_tar: Any = tarfile.open  # whose type hides the list of members
    with open_tar(fileobj=content, mode="r:") as tar:
        for member in tar:
            tar.members = []  # it would hold them all
            if member.size < 0 or member.offset < end:
                raise _damaged(file, f"{member.name!a:.60} has {member.size} bytes")
            end = member.offset + _HEADER
            if not member.isreg() or member.issparse():
                continue
            content.seek(member.offset_data - _HEADER)
            head = content.read(_HEADER)
            name = posixpath.normpath(member.name)
            found.append((name, member.offset_data, member.size, zlib.crc32(head)))
            digest.update(name.encode(errors="surrogateescape") + b"\0" + head)
            if name.endswith(".json"):
                digest.update(content.read(member.size))
        _check_end(content, tar.offset, file)
    names = [name for name, *_ in found]
    numbers = np.array([n for _, *n in found], np.int64).reshape(-1, 3)
    starts, sizes, heads = numbers.T
    return Index(names, starts, sizes, heads.astype(np.uint32), digest.hexdigest())


def _check_end(content: Any, offset: int, file: DataFile) -> None:
    """tarfile ends without a word where a shard was cut, or a header is damaged."""
    content.seek(offset)
    behind = content.read(_MOST_BEHIND)
    if len(behind) < _HEADER or behind.strip(b"\0"):
        problem = "it has no end" if not behind else f"byte {offset} begins no file and no end"
        raise _damaged(file, problem)


def _damaged(file: DataFile, reason: str) -> InputError:
    return InputError(f"Cannot read the tar file {file}: {reason}; copy or write it again.")


def _kept_at(file: DataFile) -> Path:
    if isinstance(file, Remote):
        state: Sequence[Any] = (file.url, file.fs.ukey(file.path))
    else:
        found = file.stat()
        names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
        state = (file.resolve(), *(getattr(found, name) for name in names))
    key = "\0".join(map(str, (_VERSION, *state))).encode(errors="surrogateescape")
    return Path(environment.cache_folder("tars")) / f"{hashlib.sha256(key).hexdigest()}.npz"


def _load(path: Path, size: int) -> Index | None:
    """None where there is none, or none that can be trusted."""
    try:
        if path.stat().st_uid != os.getuid():
            return None
        with np.load(path, allow_pickle=False) as kept:
            text = kept["names"].tobytes().decode(errors="surrogateescape")
            names = text.split("\0")[:-1]
            numbers = (kept["starts"], kept["sizes"], kept["heads"])
            index = Index(names, *numbers, str(kept["digest"]))
    except Exception:  # it is made again
        return None
    fits = all(len(array) == len(names) for array in numbers)
    return index if fits and ((index.starts + index.sizes) <= size).all() else None


def _keep(path: Path, index: Index) -> None:
    """Whole or not at all; where nothing can be written the next opening makes it again."""
    text = "".join(f"{name}\0" for name in index.names).encode(errors="surrogateescape")
    arrays = {**index._asdict(), "names": np.frombuffer(text, np.uint8)}
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # processes share the folder
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, **arrays)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


# --- Images and videos ----------------------------------------------------------------------------


def open_shards(place: Path | str) -> "Shards":
    return Shards(matching(place), str(place))


class Shards:
    """The files of all shards by name: a media_places.Place.

    Raises InputError for a shard that is damaged, and for a name that two files have.
    """

    def __init__(self, files: Sequence[DataFile], place: str):
        with ThreadPoolExecutor(_TOGETHER) as pool:
            indices = list(pool.map(index_of, files))
        self.files, self.indices, self._place = files, indices, place
        self._ends = np.cumsum([len(index.names) for index in indices])
        self.names = list(itertools.chain.from_iterable(index.names for index in indices))
        self._at = {name: number for number, name in enumerate(self.names)}
        if len(self._at) < len(self.names):
            twice = next(n for i, n in enumerate(self.names) if self._at[n] != i)
            raise InputError(f"{place} has two files called {twice!r:.100}; rename one of them.")

    def __str__(self) -> str:
        return self._place

    def locate(self, number: int) -> tuple[int, int]:
        """Of a file of all shards: its shard, and its number there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + len(self.indices[shard].names)

    def read(self, number: int) -> bytes:
        """Raises LostError where the shard is not the one that was opened."""
        shard, row = self.locate(number)
        index, file = self.indices[shard], self.files[shard]
        start, size = int(index.starts[row]), int(index.sizes[row])
        block = read_range(file, start - _HEADER, start + size)
        if len(block) != _HEADER + size or zlib.crc32(block[:_HEADER]) != index.heads[row]:
            raise LostError(
                f"The tar file {file} has changed since it was opened: {self.names[number]!r:.100}"
                " is no longer where it was; restore the shard and start the same command again."
            )
        return block[_HEADER:]

    def picture(self, name: str, place: str) -> bytes:
        number = self._at.get(posixpath.normpath(name))
        if number is None:
            raise InputError(
                f"{place}: there is no image {name!r:.200} in {self} (links and folders in a tar"
                " are not read); add it or remove the sample."
            )
        if (size := self.size(number)) > picture_limits.MAX_BYTES:
            raise InputError(f"{place}: the image {name!r:.200} has {size:,} bytes; remove it.")
        return self.read(number)

    def video(self, name: str, place: str) -> PackedVideo:
        found = self._video(name)
        if found is None:
            raise InputError(
                f"{place}: there is no video {name!r:.200} in {self}, with or without one of"
                f" {', '.join(SUFFIXES)}; add it or remove the sample."
            )
        return PackedVideo((posixpath.basename(found),), (self.read(self._at[found]),), False)

    def measured(self, name: str, is_video: bool) -> tuple[str, int] | None:
        found = self._video(name) if is_video else posixpath.normpath(name)
        if found is None:
            return None
        number = self._at.get(found)
        return found, -1 if number is None else self.size(number)

    def size(self, number: int) -> int:
        shard, row = self.locate(number)
        return int(self.indices[shard].sizes[row])

    def _video(self, name: str) -> str | None:
        tried = (posixpath.normpath(name) + end for end in ("", *SUFFIXES))
        return next((name for name in tried if name in self._at), None)
