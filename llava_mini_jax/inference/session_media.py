"""The pictures and videos of a session: read once, encoded once, recalled for every question.

    file, array --a thread reads ahead--> chunks --encode--> visual tokens (host)
                                            |           '--> pre-fusion's keys and values --> Shelf
                                            '--- pixels, where there is no file to read again --^

Of a video at most a few chunks are in memory at a time, beside what the shelf has room for.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.data.batches.examples import power_of_two
from llava_mini_jax.data.media.video import FrameSampling, preprocess_frames, read_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import request, session_programs
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.read_ahead import ReadAhead
from llava_mini_jax.inference.request import Picture, Video
from llava_mini_jax.inference.shelf import Budget, Kept, Shelf

Frames = Iterator[np.ndarray]  # as the model reads them, uint8 [J, Y, X, C]


class Medium:
    """An image or a video: frames that were seen, and those still to be read.

    Ctrl-C, or a full disk, loses none of them: a frame is in `waiting`, `taken` or `tokens`.
    """

    def __init__(
        self,
        waiting: Frames,
        expected: int,
        reopen: Callable[[], Frames] | None = None,
        *,
        is_picture: bool = False,
    ):
        self.waiting = waiting
        self.taken: list[np.ndarray] = []  # read, and not yet seen
        self.expected = expected  # how many there are in all
        self.reopen = reopen  # reads the first `in_file` of them again
        self.in_file = expected if reopen else 0
        self.is_picture = is_picture
        self.tokens: list[np.ndarray] = []  # visual tokens [frames, Q, D] of each chunk
        self.kept: list[Kept] = []

    @property
    def seen(self) -> int:
        return sum(map(len, self.tokens))

    def take(self, count: int) -> list[np.ndarray]:
        """The next `count` frames, or all that are left; the same ones until they are seen."""
        while len(self.taken) < count and (frame := next(self.waiting, None)) is not None:
            self.taken.append(frame)
        return self.taken


class Watched:
    """All pictures and videos of a session, in the order in which they were shown."""

    def __init__(self, model: Model, budget: Budget, chunk: int):
        self.media: list[Medium] = []
        self._model = model
        self._chunk = chunk
        self._shelf = Shelf(budget)
        self._broken = ""  # why a video cannot be read to its end

    @property
    def frames(self) -> int:
        """Images and frames that have been shown, those not yet read included."""
        return sum(medium.expected for medium in self.media)

    def show_image(self, image: Picture) -> None:
        request.check_kind(image, Picture, "a picture", request.PICTURE)
        pixels = request.read_pictures(image, None, self._model.bundle).pixels
        self.media.append(Medium(iter(pixels), 1, is_picture=True))

    def open_video(self, video: Video, sampling: FrameSampling) -> Medium:
        """A video that is not among `media` yet; nothing of it has been decoded."""
        if isinstance(video, np.ndarray):
            if video.ndim and not len(video):
                raise InputError("a video is an array of 0 frames; give 1 or more")
            request.check_video(video)
            frames = self._prepared(video, "bicubic")
            return Medium(ReadAhead(frames, self._chunk), len(video))
        request.check_video(video)
        resize, first = request.resize_of(video, sampling), read_video(video, sampling)

        def reopen() -> Frames:
            return ReadAhead(self._prepared(read_video(video, sampling), resize), self._chunk)

        return Medium(ReadAhead(self._prepared(first, resize), self._chunk), len(first), reopen)

    def append_frames(self, frames: Sequence[np.ndarray]) -> None:
        medium = self.media[-1]
        more = list(self._prepared(_checked(list(frames)), "bicubic"))
        medium.waiting = itertools.chain(medium.waiting, more)
        medium.expected += len(more)

    def _prepared(self, frames: Iterable[np.ndarray], resize: str) -> Frames:
        cfg = self._model.bundle.images
        return (preprocess_frames([frame], cfg, resize=resize)[0] for frame in frames)

    def visual(self) -> np.ndarray:
        """Visual tokens [V, D] of all frames in their order."""
        width = self._model.bundle.model.llm.width
        chunks = [chunk.reshape(-1, width) for medium in self.media for chunk in medium.tokens]
        return np.concatenate(chunks) if chunks else np.zeros((0, width))

    def memory(self) -> dict[str, int]:
        """Bytes by place, and of the visual tokens."""
        tokens = sum(chunk.nbytes for medium in self.media for chunk in medium.tokens)
        return {**self._shelf.used(), "tokens": tokens}

    def memories(self) -> Iterator[tuple[Any, int]]:
        """(pre-fusion's keys and values, frames) of every chunk; what is new is seen on the way.

        Keys and values are None for a model without pre-fusion; without any picture they are those
        of a blank one, where the model wants that. Raises InputError for a video that cannot be
        read to its end, then and whenever it is called again.
        """
        if self._broken:
            raise InputError(self._broken)
        if not self.media and self._model.bundle.prompt.blank_image:
            yield self._encode(request.blank_image(self._model.bundle.images))[1], 1
        try:
            for medium in self.media:
                yield from self._again(medium)
                while frames := medium.take(self._chunk):
                    yield self._encode_new(medium, frames), len(frames)
                _check_all(medium.seen, medium.expected)
        except InputError as error:
            self._broken = str(error)
            raise

    def _again(self, medium: Medium) -> Iterator[tuple[Any, int]]:
        """`memories` of the chunks that have been seen."""
        file, passed = None, 0  # the file that is read again, and how far it has got
        start = 0
        for kept in medium.kept:
            if kept.tier == "source":
                assert medium.reopen is not None
                file = medium.reopen() if file is None else file
                # Passes over frames of chunks that are kept in another form.
                frames = list(itertools.islice(file, start - passed, start - passed + kept.frames))
                _check_all(len(frames), kept.frames)
                yield self._encode(self._chunk_of(frames))[1], kept.frames
                passed = start + kept.frames
            else:
                yield self._recall(kept), kept.frames
            start += kept.frames

    def _encode_new(self, medium: Medium, frames: list[np.ndarray]) -> Any:
        pixels_IJYXC = self._chunk_of(frames)
        tokens_IQD, memory, features = self._encode(pixels_IJYXC)
        can_be_read_again = medium.seen + len(frames) <= medium.in_file
        # To the host: on the device they would grow with the video.
        tokens = [np.asarray(tokens_IQD)[: len(frames)]]
        stages = {"memory": memory, "features": features}
        if not can_be_read_again:
            stages["pixels"] = pixels_IJYXC
        kept = []
        if memory is not None:  # without pre-fusion nothing of a frame is read again
            # Of all media: the shelf leaves room for what is still to come.
            unseen = self.frames - sum(medium.seen for medium in self.media) - len(frames)
            kept = [self._shelf.put(len(frames), stages, -(-unseen // self._chunk))]
        # In one statement, which Ctrl-C does not divide: a frame is seen or it is not.
        medium.tokens, medium.kept, medium.taken = medium.tokens + tokens, medium.kept + kept, []
        return memory

    def _recall(self, kept: Kept) -> Any:
        found = self._shelf.get(kept)
        if kept.tier == "pixels":
            return self._encode(found)[1]
        if kept.tier == "features":
            return session_programs.prefuse_images(
                self._model.params, found, self._model.bundle.model
            )[1]
        return found

    def _chunk_of(self, frames: list[np.ndarray]) -> np.ndarray:
        """Frames as a chunk of one of few sizes, padded with the first one."""
        size = min(self._chunk, power_of_two(len(frames)))
        return np.stack(frames + frames[:1] * (size - len(frames)))

    def _encode(self, pixels_IJYXC: np.ndarray) -> tuple[Any, Any, Any]:
        """(visual tokens, pre-fusion's keys and values, features) of a chunk."""
        features = session_programs.encode_vision(
            self._model.params, pixels_IJYXC, self._model.bundle.model
        )
        tokens, memory = session_programs.prefuse_images(
            self._model.params, features, self._model.bundle.model
        )
        return tokens, memory, features


def _checked(frames: Any) -> Any:
    for frame in frames:
        request.check_frame(frame, "frame of a video")
    return frames


def _check_all(given: int, expected: int) -> None:
    if given != expected:
        raise InputError(f"a video gave {given} of {expected} frames; it changed while it was read")
