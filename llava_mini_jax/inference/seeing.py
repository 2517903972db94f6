"""How an engine sees: frames of waiting requests, a chunk a step, and text that is fused with them.

    images of several requests --encode together--> tokens, keys and values --fuse--> each's text
    a chunk of a film (read by a thread) --encode--> tokens, keys and values --fuse--> its text
    what the gallery knows ----------------------------recall----------------^

A chunk is small while others are being answered: their next tokens wait for it.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from llava_mini_jax.data.batches.examples import powers_of_two
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import seeing_programs
from llava_mini_jax.inference.gallery import Gallery, Seen
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.read_ahead import ReadAhead
from llava_mini_jax.inference.work import Work
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

SIZES = (1, 2, 4, 8)  # frames of a chunk
FEW_SIZES = (1, 8)  # the same beside a long text, for which more programs would hardly be used
LONG_TEXT = 256


def sizes(text: int, cfg: LlavaMiniConfig) -> tuple[int, ...]:
    """Frames of chunks that are fused with so much text, where all are compiled beforehand."""
    if cfg.declared.pooled:  # neighbours would change an image's tokens
        return (1,)
    return SIZES if text <= LONG_TEXT else FEW_SIZES


def sizes_up_to(chunk: int) -> tuple[int, ...]:
    """Frames of chunks of at most `chunk`, where only those are compiled that are met."""
    return powers_of_two(1, chunk)


class _Reading(NamedTuple):
    """A film that is being read."""

    frames: ReadAhead
    number: int  # of the frame that it gives next


class _Part(NamedTuple):
    """An image that one request is to be fused with."""

    work: Work
    seen: Seen
    frame: np.ndarray | None  # None: the gallery has it


class Seeing:
    """The requests whose media are not seen to their end, in the order in which they came."""

    def __init__(
        self,
        model: Loaded,
        gallery: Gallery,
        failed: Callable[[Work, Exception], None],
        *,
        timed: bool,
        chunk: int | None,
    ):
        self._timed = timed
        # Frames of chunks: of the engine's own choice, or up to what it was given.
        self._params, self._cfg = model.params, model.bundle.model
        self._own_sizes = None if chunk is None else sizes_up_to(chunk)
        self._gallery, self._failed = gallery, failed
        self._works: list[Work] = []
        self._readers: dict[Work, _Reading] = {}  # of the film that each looks at
        self._frame_seconds = 0.0  # what a frame took of late

    @property
    def works(self) -> list[Work]:
        return self._works

    def add(self, work: Work) -> None:
        ids_BT, fuse_BF = work.ids_BT, work.fuse_BF
        texts = seeing_programs.embed_text(self._params, ids_BT, fuse_BF, self._cfg)
        work.text_BTD, work.text_BFD = texts
        work.ticket.usage.frames = sum(medium.frames for medium in work.media)
        self._works.append(work)

    def drop(self, work: Work) -> None:
        """A request that is no longer wanted, or has failed; the caller leaves its media."""
        if work in self._works:
            self._works.remove(work)
        self._close(work)

    def step(self, most_seconds: float | None) -> tuple[list[Work], bool]:
        """(requests that are seen to their end, whether anything was computed) after one chunk.

        `most_seconds` is what a chunk should take at most; None: as long as it likes.
        """
        done = self._finished()
        if done:
            return done, False
        # A film goes behind the others once it had its turn: images pass it between its chunks.
        for work in list(self._works):
            began = time.perf_counter()
            try:
                count = self._look(work, self._most(most_seconds))
            except Exception as error:  # of a file, or of a program: that request's alone
                self._failed(work, error)
                continue
            if count:
                self._measure(time.perf_counter() - began, count)
                if work in self._works and work.media[len(work.seen) - 1].frames > 1:
                    self._works.remove(work)
                    self._works.append(work)
                return self._finished(), True
        return [], False

    # ----------------------------------------------------------------------------------- pace

    def _sizes(self, text: int = 0) -> tuple[int, ...]:
        return sizes(text, self._cfg) if self._own_sizes is None else self._own_sizes

    def _size(self, count: int, text: int) -> int:
        return next(size for size in self._sizes(text) if size >= count)

    def _most(self, seconds: float | None) -> int:
        """Frames that may be looked at in a step."""
        if seconds is None or not self._frame_seconds:
            return self._sizes()[-1]
        return max((s for s in self._sizes() if s * self._frame_seconds <= seconds), default=1)

    def _measure(self, seconds: float, frames: int) -> None:
        each = seconds / frames
        # A first call may have compiled: what is far off counts little.
        old = self._frame_seconds or each
        self._frame_seconds = min(0.8 * old + 0.2 * each, 2 * old)

    def _wait(self, computed: Any) -> None:
        """Where times matter: the clock is read when the device has done it."""
        if self._timed:
            jax.block_until_ready(computed)

    # -------------------------------------------------------------------------------- progress

    def _finished(self) -> list[Work]:
        done = [work for work in self._works if self._advance(work)]
        self._works = [work for work in self._works if work not in done]
        return done

    def _advance(self, work: Work) -> bool:
        """Whether all of its media are seen; goes on to the next medium where one is."""
        while True:
            if work.seen:
                seen = work.seen[-1]
                if self._params.prefusion is None:  # its tokens are all that it gives
                    self._passed(work, seen.frames - work.frames)
                    work.chunk = len(seen.kept)
                if work.frames < seen.expected:
                    return False
                self._close(work)
            if len(work.seen) == len(work.media):
                self._conclude(work)
                return True
            medium = work.media[len(work.seen)]
            known = self._gallery.find(work.tenant, medium)
            seen = known or self._gallery.open(work.tenant, medium)
            work.ticket.usage.recalled += seen.frames
            seen.users += 1
            work.seen.append(seen)
            work.frames = work.chunk = 0

    def _conclude(self, work: Work) -> None:
        """The text with its mean over all frames."""
        if work.total_FD is not None:
            frames = np.int32(work.fused)
            work.text_BTD = seeing_programs.mean_text(
                work.total_FD, frames, work.text_BTD, work.fuse_BF
            )
        work.text_BFD = work.total_FD = None

    def _passed(self, work: Work, frames: int) -> None:
        work.frames += frames
        work.fused += frames
        work.ticket.usage.seen += frames

    def _look(self, work: Work, most: int) -> int:
        """Frames that were looked at for `work` and others; 0 where it has to wait."""
        seen, medium = work.seen[-1], work.media[len(work.seen) - 1]
        if work.chunk == len(seen.kept):  # what is new, one request alone adds
            if seen.owner not in (None, work):
                return 0
            seen.owner = work
        work.begin()
        return self._pictures(work, most) if medium.frames == 1 else self._film(work, most)

    # -------------------------------------------------------------------------------- images

    def _pictures(self, first: Work, most: int) -> int:
        parts = self._parts(first, most)
        size, began = self._size(len(parts), first.ids_BT.shape[1]), time.perf_counter()
        if parts[0].frame is None:
            memories = [self._recalled(part.seen.kept[0]) for part in parts]
            memory = memories[0]
            if size > 1:
                memory = seeing_programs.join(tuple(_filled(memories, size)))
        else:
            memory = self._encode_pictures(parts, size)
        seen_at = time.perf_counter()
        if self._params.prefusion is not None:
            texts = tuple(_filled([part.work.text_BFD for part in parts], size))
            fused = seeing_programs.prefuse_texts(self._params, memory, texts, self._cfg)
            for part, fused_FD in zip(parts, fused, strict=False):
                total_FD = part.work.total_FD
                part.work.total_FD = (
                    fused_FD if total_FD is None else seeing_programs.add(total_FD, fused_FD)
                )
            self._wait(fused)
        for part in parts:
            part.work.ticket.usage.vision += seen_at - began
            part.work.ticket.usage.fusion += time.perf_counter() - seen_at
            self._passed(part.work, 1)
            part.work.chunk += 1
        return len(parts)

    def _parts(self, first: Work, most: int) -> list[_Part]:
        """The image that `first` waits for, and those of others that may go with it."""
        parts: list[_Part] = []
        for work in [first, *self._works]:
            if len(parts) == most:
                break
            seen, medium = work.seen[-1], work.media[len(work.seen) - 1]
            if medium.frames != 1 or any(part.work is work for part in parts):
                continue
            if work.ids_BT.shape != first.ids_BT.shape or work.frames:
                continue
            known = bool(seen.kept) and seen.kept[0].tier != "source"
            if parts and known != (parts[0].frame is None):
                continue
            if not known:
                # Another's, who has begun with it or is about to: it is known in a moment.
                if seen.owner not in (None, work) or any(part.seen is seen for part in parts):
                    continue
                try:
                    frame = next(medium.read())
                except Exception as error:
                    if work is first:
                        raise
                    self._failed(work, error)
                    continue
                if parts and not _alike(frame, parts[0].frame):
                    continue
                seen.owner = work
                work.begin()
                parts.append(_Part(work, seen, frame))
            else:
                work.begin()
                parts.append(_Part(work, seen, None))
        return parts

    def _encode_pictures(self, parts: Sequence[_Part], size: int) -> Any:
        pixels_IJYXC = np.stack(_filled([part.frame for part in parts], size))
        questions = _filled([part.work.question for part in parts], size)
        visual, memory, features = self._encode(pixels_IJYXC, questions)
        for number, part in enumerate(parts):
            if not part.seen.complete:
                known = part.seen.name is not None
                stages = _stages(memory, features, number, size) if known else {}
                following = _unseen(part.work)
                self._gallery.put(part.seen, visual, number, 1, stages, following - 1)
            part.seen.owner = None
        self._wait(visual)
        return memory

    def _encode(
        self, pixels_IJYXC: np.ndarray, questions: Sequence[np.ndarray | None]
    ) -> tuple[Any, Any, Any]:
        """(visual tokens, pre-fusion's keys and values, features) of a chunk.

        `questions`: what each is looked at for, where the compressor reads that.
        """
        features = seeing_programs.encode_vision(self._params, pixels_IJYXC, self._cfg)
        asked = [ids_T for ids_T in questions if ids_T is not None]
        if asked:
            features = replace(features, question_IT=np.stack(asked))
        return *seeing_programs.prefuse_images(self._params, features, self._cfg), features

    # ----------------------------------------------------------------------------------- films

    def _film(self, work: Work, most: int) -> int:
        seen, began = work.seen[-1], time.perf_counter()
        new = work.chunk == len(seen.kept)
        if new:
            sizes = (size for size in self._sizes(work.ids_BT.shape[1]) if size <= most)
            count = min(max(sizes), seen.expected - work.frames)
        else:
            count = seen.kept[work.chunk].frames
        size = self._size(count, work.ids_BT.shape[1])
        if not new and seen.kept[work.chunk].tier != "source":
            memory = self._recalled(seen.kept[work.chunk])
        else:
            frames = self._frames(work, count)
            if frames is None:
                return 0
            pixels_IJYXC = np.stack(_filled(frames, size))
            asked = [work.question] * size
            visual, memory, features = self._encode(pixels_IJYXC, asked)
            if new:
                stages = {} if memory is None else {"memory": memory, "features": features}
                following = -(-_unseen(work) // count) - 1
                self._gallery.put(seen, visual, 0, count, stages, following)
            self._wait(visual)
        seen_at = time.perf_counter()
        if self._params.prefusion is not None:
            if work.total_FD is None:
                work.total_FD = np.zeros(work.text_BFD.shape[1:], np.float32)
            work.total_FD = seeing_programs.prefuse_text(
                self._params, work.total_FD, memory, np.int32(count), work.text_BFD, self._cfg
            )
            self._wait(work.total_FD)
        usage = work.ticket.usage
        usage.vision += seen_at - began
        usage.fusion += time.perf_counter() - seen_at
        self._passed(work, count)
        work.chunk += 1
        if seen.complete:
            seen.owner = None
        return count

    def _recalled(self, kept: Any) -> Any:
        found = self._gallery.get(kept)
        if kept.tier == "features":
            return seeing_programs.prefuse_images(self._params, found, self._cfg)[1]
        return found

    def _frames(self, work: Work, count: int) -> list[np.ndarray] | None:
        """The next frames of its film; None while a thread still reads them."""
        reading = self._readers.get(work)
        if reading is None or reading.number != work.frames:  # what was recalled is passed over
            self._close(work)
            reading = self._readers[work] = self._begin_reading(work)
        if not reading.frames.ready(count):
            return None
        taken = list(itertools.islice(reading.frames, count))
        self._readers[work] = reading._replace(number=work.frames + len(taken))
        if len(taken) < count:
            raise InputError(
                f"a video gave {work.frames + len(taken)} of {work.seen[-1].expected} frames; the"
                " rest cannot be read"
            )
        return taken

    def _begin_reading(self, work: Work) -> _Reading:
        medium, first = work.media[len(work.seen) - 1], work.frames
        if medium.read_from is not None:
            frames = medium.read_from(first)
        else:
            frames = itertools.islice(medium.read(), first, None)
        if not isinstance(frames, ReadAhead):
            frames = ReadAhead(frames, self._sizes()[-1])
        return _Reading(frames, first)

    def _close(self, work: Work) -> None:
        reading = self._readers.pop(work, None)
        if reading is not None:
            reading.frames.close()


def _unseen(work: Work) -> int:
    """Frames of a request that its text is not fused with yet."""
    return sum(medium.frames for medium in work.media) - work.fused


def _filled(items: Sequence[Any], size: int) -> list[Any]:
    """As many as a program is compiled for; the first one again where there are fewer."""
    return [*items, *[items[0]] * (size - len(items))]


def _alike(a: np.ndarray, b: np.ndarray | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype


def _stages(memory: Any, features: Any, number: int, size: int) -> dict[str, Any]:
    """What may be kept of one image of a chunk."""
    if memory is None:
        return {}
    if size == 1:
        return {"memory": memory, "features": features}
    return {
        "memory": seeing_programs.one_of(memory, np.int32(number), axis=1),
        "features": seeing_programs.one_of(features, np.int32(number), axis=0),
    }
