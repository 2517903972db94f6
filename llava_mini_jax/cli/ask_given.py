"""What `llava-mini ask` is shown, wherever it lies: found before the weights are read.

    FILE ------------------------------------------------.
    -    standard input, to its end --load_image--.      |
    data:..., http(s)://... --serving/sources.py--+------+--> images, films
                                                  '-- a film: a temporary file

Urls have the server's rules (docs/serving.md): its limits of bytes and seconds, public addresses
alone, no redirects. Where the server asks its operator which hosts it may fetch from, the person
who types a url has named its host.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_mini_jax.errors import InputError, short

if TYPE_CHECKING:
    from PIL import Image

    from llava_mini_jax.serving.sources import Left, Source, Sources

STDIN = "-"
_REMOTE = ("http://", "https://")
_URLS = ("data:", *_REMOTE)
_SHOWN = 80  # characters of a url in a message
_ADVICE = (
    " (public addresses alone are asked, and redirects are not followed); check it, or download the"
    " file and give its path"
)


class Given:
    """Opens what the options name; what it has fetched is there as long as this is."""

    def __init__(self, images: Sequence[str], videos: Sequence[str]):
        """Raises InputError for standard input that nothing can be read from."""
        self._images, self._videos = images, videos
        self._kept: list[Source] = []  # with them temporary files end
        if STDIN in videos:
            raise InputError("--video - is standard input, which holds an image (--image -) alone")
        if images.count(STDIN) > 1:
            raise InputError(f"--image - is given {images.count(STDIN)} times; it holds one image")
        if STDIN in images and sys.stdin.isatty():
            raise InputError(
                "--image - reads standard input, which is a terminal; pipe a file there"
            )
        self._sources, self._left = _opening([*images, *videos])

    def pictures(self) -> "list[str | Image.Image]":
        """Paths as they are, the others decoded. Raises InputError for what cannot be had."""
        return [self._picture(given) for given in self._images]

    def films(self) -> list[str]:
        """Paths, and those of temporary files. Raises InputError for what cannot be had."""
        return [self._film(given) for given in self._videos]

    def _picture(self, given: str) -> "str | Image.Image":
        from llava_mini_jax.data.media.image_file import load_image
        from llava_mini_jax.data.media.picture_limits import MAX_BYTES

        if given != STDIN and not _is_url(given):
            return given
        name, content = "standard input (--image -)", b""
        if given == STDIN:
            content = sys.stdin.buffer.read(MAX_BYTES + 1)  # one more is refused by its size
        else:
            name = _name("image", given)
            with _told():
                found = self._sources.picture(given, self._left, name).content
            assert isinstance(found, bytes)
            content = found
        try:
            return load_image(content)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _film(self, given: str) -> str:
        if not _is_url(given):
            return given
        with _told():
            source = self._sources.film(given, self._left, sys.maxsize, _name("video", given))
        if not isinstance(source.content, Path):
            raise InputError(
                "--video is a data: url of single frames; write them to a folder and give that"
            )
        self._kept.append(source)
        return str(source.content)


def _is_url(given: str) -> bool:
    return given.lower().startswith(_URLS)


def _name(kind: str, url: str) -> str:
    """For messages; of a data: url nothing but its beginning says anything."""
    return f"the {kind} {short(url, 30 if url[:5].lower() == 'data:' else _SHOWN)}"


def _opening(given: Sequence[str]) -> "tuple[Sources, Left]":
    """The server's reader of urls, for the hosts of those that are given."""
    from llava_mini_jax.serving import fetch
    from llava_mini_jax.serving.limits import Limits
    from llava_mini_jax.serving.sources import Left, Sources

    hosts = [fetch.ANY_HOST]  # on the usual ports; a malformed url is told of when it is opened
    for url in filter(_is_url, given):
        with contextlib.suppress(ValueError):
            place = fetch.parse(url)
            hosts.append(f"{place.host}:{place.port}")
    limits = Limits()
    return Sources(limits, hosts, None), Left(limits.downloads_bytes)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """The server's errors as sentences for the person who gave the url."""
    from llava_mini_jax.serving.errors import ApiError

    try:
        yield
    except ApiError as error:
        raise InputError(error.message + _ADVICE * (error.status == 422)) from error
