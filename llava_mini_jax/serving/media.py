"""Images and films of a request, as the engine reads them.

    ImagePart, VideoPart --counted--> Source (sources.py, or kept.py by its uuid)
        image --header checked, decoded, preprocessed--> one frame, here
        film --counted in a process of its own (film.py)--> its frames, once the engine takes them
            --> Medium: SHA-256 of the content and of all that changes its pixels; frames; read

Whatever is wrong with one of them is an ApiError: its sentence says nothing of this machine, nor
what a decoder said.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.media.image_file import TooLargeError, load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.data.media.video import FrameSampling, release_frame_indices
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, request
from llava_mini_jax.inference.ticket import Medium
from llava_mini_jax.serving import film
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.kept import Kept, Pixels
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.parts import DETAILS, ImagePart, VideoOptions, VideoPart
from llava_mini_jax.serving.sources import Left, Source, Sources

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # each more would be a decoder more to attack
_WHITE = (255, 255, 255)
_ALL = -1
_FASTEST = 1000.0  # frames a second; no film has more
_LONGEST_UUID = 256
_COUNTS = 1000  # films whose number of frames is remembered
T = TypeVar("T", Pixels, Source)
_DECODERS = 4  # images that are decoded at once: each may take half a gigabyte


class MediaReader:
    """Reads the media of requests, for one model.

    `hosts` are those that remote urls may name (none: no remote urls), `folder` is where file: urls
    may lie (None: none). Raises InputError where one of them is wrong.
    """

    def __init__(
        self,
        bundle: Bundle,
        limits: Limits,
        *,
        hosts: Sequence[str] = (),
        folder: Path | None = None,
    ):
        self._bundle, self._limits = bundle, limits
        self._sources = Sources(limits, hosts, folder)
        self._kept = Kept(limits.kept_bytes)
        self.fetched: Callable[[float], None] = lambda seconds: None  # a request's remote files
        self._counts: dict[tuple[str, bytes], int] = {}  # frames of films, by tenant and key
        self._decoders = threading.BoundedSemaphore(_DECODERS)
        # A quarter of the context is for text.
        room = 3 * bounds.longest_prompt(bundle) // 4
        fitting = max(1, room // max(1, bounds.tokens_per_image(bundle)))
        self._most_frames = limits.frames or fitting

    def read(
        self, parts: Sequence[ImagePart | VideoPart], video: VideoOptions, tenant: str
    ) -> list[Medium]:
        """The media of a request in the order of its parts. It blocks; any thread may call it.

        Images are decoded here, where they are not known by their `uuid`; films are opened, and
        their frames decoded as they are taken, which may raise an ApiError as well. Raises
        ApiError: 400 for what cannot be read or is not allowed, 404 for an unknown `uuid`, 422 for
        a remote file that cannot be had.
        """
        images = [part for part in parts if isinstance(part, ImagePart)]
        self._check_counts(len(images), len(parts) - len(images))
        sampling = self._sampling(video)
        left = Left(self._limits.downloads_bytes)
        pixels = self._limits.decoded_bytes // 4
        media: list[Medium] = []
        numbers = {"image": 0, "video": 0}
        for part in parts:
            kind = "image" if isinstance(part, ImagePart) else "video"
            numbers[kind] += 1
            name = f"{kind} {numbers[kind]}"
            _check_uuid(part, name)
            if isinstance(part, ImagePart):
                medium, used = self._picture(part, name, tenant, left, pixels)
                pixels -= used
            else:
                medium = self._film(part, name, tenant, left, sampling)
            media.append(medium)
        if left.seconds:
            self.fetched(left.seconds)
        return media

    def _check_counts(self, images: int, videos: int) -> None:
        for kind, given, most in (
            ("image", images, self._limits.images),
            ("video", videos, self._limits.videos),
        ):
            if given > most:
                raise ApiError(
                    400,
                    f"the request has {given} {kind}s; at most {most} {kind}(s) may be provided",
                    param=f"{kind}_url",
                )

    def _named(self, part: ImagePart | VideoPart, kind: type[T], name: str, tenant: str) -> T:
        """What a client has sent before under this `uuid`."""
        found = self._kept.get(tenant, part.uuid, kind) if part.uuid is not None else None
        if found is None:
            raise ApiError(
                404, f"the uuid of {name} is not known; send it again with its url", param="uuid"
            )
        return found

    # ------------------------------------------------------------------------------- images

    def _picture(
        self, part: ImagePart, name: str, tenant: str, left: Left, pixels: int
    ) -> tuple[Medium, int]:
        """An image, and how many pixels were decoded for it."""
        if part.detail not in DETAILS:
            raise ApiError(
                400,
                f"the detail of {name} is {part.detail!r:.40}; give one of {', '.join(DETAILS)}",
                param="image_url",
            )
        tiles, used = self._bundle.images.grid > 1, 0
        low = part.detail == "low" and tiles
        if part.url is None:
            found = self._named(part, Pixels, name, tenant)
        else:
            source = self._sources.picture(part.url, left, name)
            assert isinstance(source.content, bytes)
            # What is kept may be asked about with another detail.
            details = {low, False, tiles} if part.uuid is not None else {low}
            frames, used = self._decode(source.content, name, details, pixels)
            found = Pixels(source.digest, frames)
            if part.uuid is not None:
                self._kept.put(tenant, part.uuid, found)
        key = _key(found.digest, self._bundle.images, low)
        return Medium(key, 1, lambda: iter([found.frames[low]])), used

    def _decode(
        self,
        content: bytes,
        name: str,
        details: Iterable[bool],
        pixels: int,
        param: str = "image_url",
    ) -> tuple[dict[bool, np.ndarray], int]:
        """uint8 [J, size, size, 3] of each detail (low, or not), and how many pixels the image
        has, at most `pixels`."""
        most = min(self._limits.image_pixels, pixels)
        cfg = self._bundle.images
        try:
            with self._decoders:
                image = load_image(content, formats=FORMATS, max_pixels=most, background=_WHITE)
                frames = {low: _prepared(image, cfg, low) for low in details}
                return frames, image.width * image.height
        except TooLargeError:
            reason = (
                f"it has more than {most:,} pixels, or needs more memory or time than allowed;"
                " make it smaller"
            )
        except InputError:
            reason = f"it is not a complete image in one of the formats {', '.join(FORMATS)}"
        raise ApiError(400, f"{name} cannot be read: {reason}", param=param)

    # ---------------------------------------------------------------------------------- films

    def _film(
        self, part: VideoPart, name: str, tenant: str, left: Left, sampling: FrameSampling
    ) -> Medium:
        try:
            request.refuse_videos(self._bundle)
        except InputError as error:
            raise ApiError(400, f"{name}: {error}", param="video_url") from None
        if part.url is None:
            source = self._named(part, Source, name, tenant)
        else:
            source = self._sources.film(part.url, left, self._most_frames, name)
        if isinstance(source.content, tuple):
            medium = self._from_frames(source, source.content, name, sampling)
        else:
            medium = self._from_file(source, name, tenant, sampling)
        if part.url is not None and part.uuid is not None:
            self._kept.put(tenant, part.uuid, source)
        if medium.frames == 1:  # engines read one like an image, without a thread that waits
            frames = list(medium.read())
            medium = replace(medium, read=lambda: iter(frames))
        return medium

    def _from_file(self, source: Source, name: str, tenant: str, sampling: FrameSampling) -> Medium:
        assert isinstance(source.content, Path)
        path, cfg = source.content, self._bundle.images
        how = film.How(cfg, sampling, request.resize_of(path, sampling), self._limits)
        key = _key(source.digest, cfg, sampling)
        count = self._counts.get((tenant, key))
        if count is None:
            count = self._counts[tenant, key] = film.count_frames(path, how, name)
            while len(self._counts) > _COUNTS:
                self._counts.pop(next(iter(self._counts)), None)

        def read(source: Source = source) -> Iterator[np.ndarray]:  # which keeps the file
            yield from film.read_frames(path, how, name)

        return Medium(key, count, read)

    def _from_frames(
        self, source: Source, frames: Sequence[bytes], name: str, sampling: FrameSampling
    ) -> Medium:
        """Frames that the client has taken from a film: they have no times, only an order."""
        count = sampling.number(len(frames), len(frames))
        wanted = range(count) if count == len(frames) else release_frame_indices(len(frames), count)
        pixels = self._limits.decoded_bytes // 4
        chosen = [(int(i), frames[i]) for i in wanted]

        def read() -> Iterator[np.ndarray]:
            for i, frame in chosen:
                told = f"frame {i + 1} of {name}"
                yield self._decode(frame, told, [False], pixels, "video_url")[0][False]

        return Medium(_key(source.digest, self._bundle.images, sampling), count, read)

    def _sampling(self, video: VideoOptions) -> FrameSampling:
        """What a request asks for, with all of the server's limits already in it."""
        count, fps = video.num_frames, video.fps
        if count is not None and (
            isinstance(count, bool) or not (0 < count < math.inf or count == _ALL)
        ):
            raise _no_option("num_frames", count, "a number of frames, or -1 for all")
        if fps is not None and (isinstance(fps, bool) or not (0 < fps < math.inf or fps == _ALL)):
            raise _no_option("fps", fps, "a finite number above 0, or -1 for all")
        most = self._most_frames if count in (None, _ALL) else min(count, self._most_frames)
        usual = request.sampling_for(self._bundle, max_frames=most)
        if fps is not None and fps != _ALL:
            return replace(usual, fps=min(float(fps), _FASTEST))
        return usual if (count, fps) == (None, None) else replace(usual, fps=None, count=most)


def _no_option(name: str, value: object, expected: str) -> ApiError:
    given = f"media_io_kwargs.video.{name}"
    return ApiError(400, f"{given} is {value!r:.40}; give {expected}", param=given)


def _check_uuid(part: ImagePart | VideoPart, name: str) -> None:
    if part.uuid is not None and not 0 < len(part.uuid) <= _LONGEST_UUID:
        raise ApiError(
            400,
            f"the uuid of {name} has {len(part.uuid):,} characters; give 1 to {_LONGEST_UUID}",
            param="uuid",
        )
    if part.uuid is None and part.url is None:
        raise ApiError(400, f"{name} has neither url nor uuid; give one", param=None)


def _prepared(image: Image.Image, cfg: ImageConfig, low: bool) -> np.ndarray:
    """The parts of an image; those of a `low` one show no more than a single part can."""
    if low:
        whole = replace(cfg, grid=1, repeat_whole=False)
        image = Image.fromarray(preprocess(image, whole)[0])
    return preprocess(image, cfg)


def _key(digest: bytes, cfg: ImageConfig, how: object) -> bytes:
    """Of the content, and of everything that makes pixels of it (dataclasses of plain values)."""
    return hashlib.sha256(digest + repr((cfg, how)).encode()).digest()
