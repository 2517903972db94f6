"""What an engine is asked, and what it tells while it answers.

    Request --Engine.submit--> Ticket --listener, on the engine's thread--> Piece, ... the last one
                                  '-- cancel: it leaves at the next step     with the Answer

An engine knows no protocol: who speaks one (serving/) makes Requests of what clients send.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.inference.answer import Answer, Settings


@dataclass(frozen=True)
class Medium:
    """An image or a film of a request, whose frames are read only where they are not known."""

    key: bytes  # of its content and of all that changes its pixels; b"": known to nobody
    frames: int  # 1 for an image
    read: Callable[[], Iterator[np.ndarray]]  # frames as the model reads them, uint8 [J, Y, X, C]
    # The same from a frame of that number on, where it takes less than passing over those before.
    read_from: Callable[[int], Iterator[np.ndarray]] | None = None
    kept: slice | None = None  # of each frame's tokens, those that are kept; None: all of them


@dataclass(frozen=True)
class Request:
    """A prompt, checked to fit the model, with its media in the order of its marks."""

    example: Example  # its pixels are left empty: frames come from `media`
    media: Sequence[Medium]
    settings: Settings
    tenant: str = ""  # what is remembered for one is never found by another


@dataclass(frozen=True)
class Token:
    """A token of an answer, with what the model thought of it (log probabilities, natural)."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]  # the likeliest, as many as were asked for


@dataclass(frozen=True)
class Piece:
    """What one call has added to an answer."""

    text: str  # settled: it is never taken back, and may be empty
    ids: Sequence[int] = ()  # the tokens that this piece adds, an end not among them
    tokens: Sequence[Token] = ()  # the same, where log probabilities were asked for
    answer: Answer | None = None  # with the last piece

    @property
    def count(self) -> int:
        """Tokens of this piece."""
        return len(self.ids)


@dataclass
class Usage:
    """Positions and seconds of a request; seconds are those of `time.perf_counter`."""

    prompt: int = 0  # positions of the language model: text, and tokens of images
    image: int = 0  # of these, tokens of images and frames
    cached: int = 0  # of these, found in the KV cache
    frames: int = 0  # images and frames of the request
    recalled: int = 0  # of these, found in memory
    seen: int = 0  # of these, looked at or recalled so far
    arrived: float = field(default_factory=time.perf_counter)
    begun: float | None = None  # its first work
    first: float | None = None  # its first token
    last: float | None = None  # its last one
    vision: float = 0.0  # seconds of calls that encoded its frames, those shared with others whole
    fusion: float = 0.0  # the same of pre-fusion's text


class Ticket:
    """A request that an engine has taken.

    `listener` is called on the engine's thread with each Piece, or once with the exception that
    ended the request; it must return at once. After an Answer, an exception, or `cancel`, nothing
    more is told.
    """

    def __init__(self, request: Request, listener: Callable[[Piece | Exception], None]):
        self.request, self.listener = request, listener
        self.usage = Usage()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """From any thread; work that has not begun never begins."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()
