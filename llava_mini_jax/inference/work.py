"""A request's way through an engine: what of it is seen, read and answered so far."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.data.batches import questions
from llava_mini_jax.data.batches.examples import fused_places
from llava_mini_jax.inference import bounds, places, request
from llava_mini_jax.inference.answer import AnswerText
from llava_mini_jax.inference.gallery import Seen
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.ticket import Medium, Piece, Ticket, Token
from llava_mini_jax.models import compressors
from llava_mini_jax.models.compressors import Taken


class Work:
    """One ticket's: its media are seen first, then its prompt is read, then it is answered."""

    def __init__(self, ticket: Ticket, model: Loaded):
        self.ticket, bundle = ticket, model.bundle
        asked, example = ticket.request, ticket.request.example
        self.tenant = asked.tenant
        # Which of each image's tokens stand in the prompt.
        self.taken = bundle.model.taken(bundle.images.parts, example.tokens)
        self.media = [_of_taken(medium, self.taken) for medium in asked.media]
        if not self.media and bundle.prompt.blank_image:
            blank = request.blank_image(bundle.images)
            # Fused with the text; no mark stands for it, so it takes no position.
            self.media = [Medium(b"blank", 1, lambda: iter(blank))]
        # What each is looked at for, where the compressor reads that: [T] ids, padded.
        most = bundle.model.declared.question
        self.questions = [questions.padded(ids_T, most) for ids_T in example.questions if most]
        if self.questions:
            # The tokens are those of image and question together, and so are they remembered.
            pairs = zip(self.media, self.questions, strict=True)
            self.media = [
                dataclasses.replace(m, key=m.key and m.key + ids.tobytes()) for m, ids in pairs
            ]
        self.settings = asked.settings
        ends: tuple[int, ...] = ()
        if not self.settings.ignore_end:
            ends, self.settings = model.stop_ids, model.with_stop_text(self.settings)
        self.stop_ids = (*self.settings.stop_ids, *ends)
        # Of its slot that the prompt takes; until its media are seen, at most.
        self.places = places.needed(example, bundle)
        self.text = self._answer(model)
        # Of the text, padded to a bucket.
        size = model.buckets.length(max(1, len(example.ids)))
        self.ids_BT = np.zeros((1, size), np.int32)
        self.ids_BT[0, : len(example.ids)] = example.ids
        self.fuse_BF = fused_places([example.fuse & bool(self.media)], size)
        self.places_T = np.flatnonzero(example.ids >= 0)  # of text, image marks left out
        # On the device:
        self.text_BTD: Any = None  # embedded, and in the end fused
        self.text_BFD: Any = None  # what of it is fused
        self.total_FD: Any = None  # float32 sum over the frames so far
        # How far it has come:
        self.seen: list[Seen] = []  # of each medium that it has begun with
        self.frames = 0  # of the medium that it looks at, those that its text is fused with
        self.chunk = 0  # the same in chunks
        self.fused = 0  # the same over all media
        self.marks = np.zeros(0, np.int64)  # what stands at each position, once all is seen
        # Of these, what leaves the slot but for its end.
        self.pieces: list[compressors.Piece] = []
        self.visual_VD = np.zeros((0, 0))
        self.lane: Any = None  # lanes.py's, once it has a slot
        self.slot = -1
        self.read = 0  # positions that its slot has read
        self.drawn: list[int] = []  # tokens, ends included

    def _answer(self, model: Loaded) -> AnswerText:
        example, bundle = self.ticket.request.example, model.bundle
        return bounds.empty_text(example, bundle, model.tokenizer, self.stop_ids, self.settings)

    @property
    def held(self) -> int:
        """Places of its slot that its prompt takes so far."""
        return places.place(self.pieces, self.read)

    @property
    def question(self) -> np.ndarray | None:
        """That of the medium that it looks at."""
        return self.questions[len(self.seen) - 1] if self.questions else None

    def begin(self) -> None:
        usage = self.ticket.usage
        usage.begun = usage.begun or time.perf_counter()

    def take(self, tokens: Sequence[int], logprobs: Callable[[int], Token] | None) -> None:
        """Tells the listener what some more tokens add; `logprobs` gives the n-th one's."""
        usage, before = self.ticket.usage, len(self.text.ids)
        usage.last = time.perf_counter()
        usage.first = usage.first or usage.last
        piece = self.text.push(tokens)
        ids = self.text.ids[before:]
        told = [logprobs(n) for n in range(len(ids))] if logprobs is not None else []
        answer = self.text.answer if self.text.finish else None
        if piece or ids or answer:
            self.tell(Piece(piece, ids, told, answer))

    def tell(self, news: Piece | Exception) -> None:
        if not self.ticket.cancelled:
            self.ticket.listener(news)


def _of_taken(medium: Medium, taken: Taken) -> Medium:
    """A film with the tokens alone that the request takes: those of all counts are megabytes a
    frame. So asked about with another count, it is looked at again; an image is not."""
    if medium.frames == 1 or taken.count == taken.made:
        return medium
    key = medium.key and medium.key + b" with %d tokens" % taken.count
    return dataclasses.replace(medium, key=key, kept=taken.places)


def mark_visual(seen: Sequence[Seen], ids_T: np.ndarray, fuse_T: np.ndarray, taken: Taken):
    """What stands at each position of a prompt [S], as numbers that are equal only where the same
    thing stands: text and whether it is fused (0 and more), or a visual token (below 0)."""
    pieces, media = [], iter(seen)
    for token, fused in zip(ids_T.tolist(), fuse_T.tolist(), strict=True):
        if token >= 0:
            pieces.append(text_marks(np.array([token]), fused))
            continue
        one = next(media)
        pieces.append(-1 - one.numbers(taken))
    return np.concatenate(pieces)


def text_marks(ids: np.ndarray, fuse: bool) -> np.ndarray:
    return 2 * ids.astype(np.int64) + fuse
