"""Where an image or film is, to its content: data, remote and local urls, and none other.

    data:image/png;base64,...  --strict base64--------------------.
    data:video/jpeg;base64,F1,F2,...  --counted, then split--------+--> Source: content, digest
    http(s)://...  --fetch.py, where hosts are allowed-------------|
    file:///...  --resolved, below the one allowed folder----------'

What the url says of the content's type is not believed.
"""

import binascii
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fetch import Fetcher
from llava_mini_jax.serving.limits import Limits

_LONGEST_HEADER = 200  # of a data url
_LONGEST_URL = 4096  # of any other
_FRAMES = "video/jpeg"
_BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """The content of an image or film."""

    content: bytes | tuple[bytes, ...] | Path  # a file's, those of a film's frames, or where it is
    digest: bytes  # SHA-256 of all of it
    size: int  # bytes that it takes to keep it
    file: Any = None  # a temporary one, which is removed once nobody has the Source


@dataclass
class Left:
    """What a request may still download."""

    bytes: int
    seconds: float = 0.0  # that downloads have taken so far


class Sources:
    """Opens urls of requests; without `hosts` no remote ones, without `folder` no local ones."""

    def __init__(self, limits: Limits, hosts: Sequence[str], folder: Path | None):
        self._limits = limits
        self._fetcher = Fetcher(hosts) if hosts else None
        self._folder = folder.resolve() if folder else None
        if self._folder and not self._folder.is_dir():
            raise InputError(f"the folder {folder} for file: urls is not there; check the path")

    def picture(self, url: str, left: Left, name: str) -> Source:
        """Raises ApiError, about `name`, for a url that cannot be opened or is not allowed."""
        scheme = _scheme(url)
        if scheme == "data":
            _, data = _data(url, name, "image_url")
            return _in_memory(_decoded(data, name, "image_url"))
        if scheme == "file":
            path = self._local(url, name, "image_url")
            if path.stat().st_size > self._limits.download_bytes:
                raise _too_large(name, self._limits.download_bytes, "image_url")
            return _in_memory(path.read_bytes())
        seconds = self._limits.image_seconds
        return _in_memory(self._remote(url, seconds, left, name, "image_url"))

    def film(self, url: str, left: Left, most_frames: int, name: str) -> Source:
        """The same for a film; at most so many frames that are sent one by one."""
        scheme = _scheme(url)
        if scheme == "data":
            kind, data = _data(url, name, "video_url")
            if kind.partition(";")[0] == _FRAMES:
                return _frames(data, most_frames, name)
            return _on_disk(_decoded(data, name, "video_url"))
        if scheme == "file":
            path = self._local(url, name, "video_url")
            state = path.stat()
            digest = _digest_of(path, state.st_size, state.st_mtime_ns, state.st_ino)
            return Source(path, digest, 0)
        seconds = self._limits.video_seconds
        return _on_disk(self._remote(url, seconds, left, name, "video_url"))

    def _remote(self, url: str, seconds: float, left: Left, name: str, param: str) -> bytes:
        if _scheme(url) not in ("http", "https"):
            raise ApiError(
                400,
                f"the url of {name} has a scheme that this server does not read; send the content"
                " as a data: url",
                param=param,
            )
        if self._fetcher is None:
            raise ApiError(
                400,
                f"{name} is a remote url, which this server does not fetch; send the content as a"
                " data: url",
                param=param,
            )
        if len(url) > _LONGEST_URL:
            raise ApiError(422, f"the url of {name} is malformed", param=param)
        most = min(self._limits.download_bytes, left.bytes)
        began = time.perf_counter()
        content = self._fetcher.fetch(url, seconds=seconds, most=most, name=name, param=param)
        left.seconds += time.perf_counter() - began
        left.bytes -= len(content)
        return content

    def _local(self, url: str, name: str, param: str) -> Path:
        """A file below the folder, no link out of it; nothing tells what is elsewhere."""
        if self._folder is not None and len(url) <= _LONGEST_URL:
            try:
                parts = urlsplit(url)
                if parts.netloc in ("", "localhost") and not (parts.query or parts.fragment):
                    path = Path(unquote(parts.path, errors="strict")).resolve()
                    inside = path.is_relative_to(self._folder) and path.is_file()
                    if inside and os.access(path, os.R_OK):
                        return path
            except (OSError, ValueError, RuntimeError):  # a name too long, a zero, a loop of links
                pass
        known = "no such file is among those that" if self._folder else "local files are not what"
        raise ApiError(400, f"{name} cannot be read: {known} this server reads", param=param)


def _scheme(url: str) -> str:
    return url[:10].partition(":")[0].lower()


def _data(url: str, name: str, param: str) -> tuple[str, str]:
    """(what stands before ";base64,", in small letters, the rest of the url)."""
    end = url.find(",", 0, _LONGEST_HEADER)
    header = url[len("data:") : max(end, 0)].lower()
    if not header.endswith(";base64"):
        raise ApiError(
            400,
            f"the data: url of {name} is not base64; write data:TYPE;base64, and the content",
            param=param,
        )
    return header.removesuffix(";base64"), url[end + 1 :]


def _decoded(data: str, name: str, param: str) -> bytes:
    try:
        content = binascii.a2b_base64(data.encode("ascii"), strict_mode=True)
    except ValueError:
        raise ApiError(
            400, f"{name} is not valid base64; encode the content again", param=param
        ) from None
    if not content:
        raise ApiError(400, f"{name} is empty (0 bytes); send its content", param=param)
    return content


def _frames(data: str, most: int, name: str) -> Source:
    count = data.count(",") + 1
    if count > most:
        raise ApiError(
            400,
            f"{name} has {count:,} frames, the limit is {most:,}; send fewer",
            param="video_url",
        )
    texts = data.split(",")
    frames = tuple(
        _decoded(text, f"frame {i + 1} of {name}", "video_url") for i, text in enumerate(texts)
    )
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(hashlib.sha256(frame).digest())
    return Source(frames, digest.digest(), sum(map(len, frames)))


def _in_memory(content: bytes) -> Source:
    return Source(content, hashlib.sha256(content).digest(), len(content))


def _on_disk(content: bytes) -> Source:
    file = tempfile.NamedTemporaryFile(prefix="film-")  # noqa: SIM115 - lives with its Source
    file.write(content)
    file.flush()
    return Source(Path(file.name), hashlib.sha256(content).digest(), len(content), file)


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, *state: int) -> bytes:
    """SHA-256 of a file, which is read again once its size, time or place is another."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _too_large(name: str, most: int, param: str) -> ApiError:
    return ApiError(400, f"{name} has more than {most:,} bytes; make it smaller", param=param)
