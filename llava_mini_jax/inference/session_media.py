"""An image or a video of a session, whose frames can be read as often as they are wanted.

    file --a thread reads ahead, from when it is shown--.
                                                        |--> frames [J, Y, X, C] from any number on
    arrays, an image: uint8 pixels, kept ---------------'

Of a file at most a few chunks are in memory at a time, beside what the shelf has room for.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.media.images import ImageConfig
from llava_mini_jax.data.media.video import FrameSampling, preprocess_frames, read_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import request
from llava_mini_jax.inference.read_ahead import ReadAhead
from llava_mini_jax.inference.request import Picture, Video
from llava_mini_jax.inference.ticket import Medium

Frames = Iterator[np.ndarray]  # as the model reads them, uint8 [J, Y, X, C]


class Shown:
    """What one show_image or show_video has shown: frames of a file, and behind them arrays.

    No iterator that it gives holds it: so a thread that reads ahead ends when it is dropped.
    """

    def __init__(self, images: ImageConfig, *, is_picture: bool):
        self.is_picture = is_picture
        self._images = images
        self._in_file = 0  # frames
        self._open: Callable[[], Frames] | None = None  # reads them, from the first one on
        # uint8 [H, W, 3] as they were given, and [J, Y, X, C] once somebody has wanted them.
        self._arrays: list[np.ndarray] = []
        self._ahead: Frames | None = None  # all frames, for who reads first

    @property
    def frames(self) -> int:
        return self._in_file + len(self._arrays)

    @property
    def pixel_bytes(self) -> int:
        """Of the frames that are kept here."""
        return sum(array.nbytes for array in self._arrays if array.ndim == 4)

    def medium(self, key: bytes) -> Medium:
        return Medium(key, self.frames, lambda: self._read(0), self._read)

    def append(self, frames: Sequence[np.ndarray]) -> None:
        first = len(self._arrays)
        self._arrays += frames
        if self._ahead is not None:
            more = _arrays_from(self._arrays, first, len(self._arrays), self._images)
            self._ahead = itertools.chain(self._ahead, more)

    def take_file(self, count: int, reopen: Callable[[], Frames]) -> None:
        self._in_file, self._open = count, reopen

    def read_ahead(self, most: int) -> None:
        """A thread begins to read, at most so many frames ahead."""
        self._ahead = ReadAhead(self._read(0), most)

    def _read(self, first: int) -> Frames:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and first == 0:
            return ahead
        begin, end = max(0, first - self._in_file), len(self._arrays)
        arrays = _arrays_from(self._arrays, begin, end, self._images)
        if self._open is None or first >= self._in_file:
            return arrays
        return itertools.chain(itertools.islice(self._open(), first, None), arrays)


def _arrays_from(arrays: list[np.ndarray], first: int, end: int, images: ImageConfig) -> Frames:
    for place in range(first, end):
        if arrays[place].ndim == 3:
            # Two threads may come to the same frame, and to the same pixels.
            arrays[place] = _prepared(arrays[place], images, "bicubic")
        yield arrays[place]


def _prepared(frame: np.ndarray, images: ImageConfig, resize: str) -> np.ndarray:
    return preprocess_frames([frame], images, resize=resize)[0]


def picture(image: Picture, bundle: Bundle) -> Shown:
    """An image, which is read now. Raises InputError for what cannot be read."""
    request.check_kind(image, Picture, "an image", request.PICTURE)
    shown = Shown(bundle.images, is_picture=True)
    shown.append(list(request.read_pictures(image, None, bundle).pixels))
    return shown


def video(given: Video, sampling: FrameSampling, bundle: Bundle) -> Shown:
    """A video, of which nothing has been decoded. Raises InputError for what is none."""
    if isinstance(given, np.ndarray) and given.ndim and not len(given):
        raise InputError("a video is an array of 0 frames; give 1 or more")
    request.check_video(given)
    shown = Shown(bundle.images, is_picture=False)
    if isinstance(given, np.ndarray):
        shown.append(list(given))
        return shown
    images, resize = bundle.images, request.resize_of(given, sampling)
    opened = [read_video(given, sampling)]  # its index serves who reads first
    count = len(opened[0])

    def frames() -> Frames:
        wanted = opened.pop() if opened else read_video(given, sampling)
        return (_prepared(frame, images, resize) for frame in wanted)

    shown.take_file(count, frames)
    return shown
