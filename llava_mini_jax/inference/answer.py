"""Answers: token ids as they arrive, to text that can be shown at once.

    ids --until a stop token, a stop string, or the allowance--> text so far
                                                                  |
        held back: half a UTF-8 character, the beginning of a stop string, spaces at the end

Text goes out in pieces that never have to be taken back, and the pieces put together are the
answer: there is no second way to make it, so streamed and whole answers cannot differ.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_mini_jax.data.text.tokenizer import told
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.sampling import row_seed

MOST_TOP = 20  # log probabilities that are told of a token, at most
BROKEN = "\ufffd"  # what decoders give for bytes that are no character, or not yet one


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to generate an answer. Raises InputError for invalid values."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # the smallest set of tokens with this probability; 1: all
    top_k: int = 0  # the k likeliest tokens; 0: all
    stop: Sequence[str] = ()  # an answer ends before the first of these
    seed: int | Sequence[int] = 0  # one from which each prompt of a list derives its own, or a list
    stop_ids: Sequence[int] = ()  # tokens that end an answer in addition to the model's own
    min_tokens: int = 0  # no token or text ends an answer before this number
    ignore_end: bool = False  # the model's own end tokens do not end it (for load tests)
    logprobs: int | None = None  # report log probabilities, and those of the N likeliest tokens

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (all tokens)"),
            ("top_k", 0 <= self.top_k < 2**31, "a number from 0 (all tokens) to 2147483647"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("stop_ids", _are_ids(self.stop_ids), "a list of token ids, 0 or more each"),
            (
                "logprobs",
                self.logprobs in (None, *range(MOST_TOP + 1)),
                f"0 to {MOST_TOP}, or None",
            ),
            ("stop", _are_texts(self.stop), "a list of texts, none of them empty"),
            ("seed", _are_seeds(self.seed), "a number from 0 to 4294967295, or a list of these"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}; give {expected}")

    def refuse_for_engine(self, who: str) -> None:
        """InputError for settings that the engine alone knows, where `who` would ignore them."""
        for name in ("stop_ids", "min_tokens", "ignore_end", "logprobs"):
            value = getattr(self, name)
            if value or (name == "logprobs" and value is not None):
                raise InputError(f"{name} is {value!r}; {who} does not support it: leave it out")

    def seeds(self, count: int) -> list[int]:
        """One seed for each of `count` prompts. Raises InputError for a list of another length."""
        if not isinstance(self.seed, Sequence):
            return [row_seed(self.seed, row) for row in range(count)]
        if len(self.seed) != count:
            raise InputError(f"seed is a list of {len(self.seed)}; give {count}, one a prompt")
        return list(self.seed)


def _are_seeds(seed: Any) -> bool:
    many = seed if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    return all(isinstance(one, int | np.integer) and 0 <= one < 2**32 for one in many)


def _are_ids(ids: Any) -> bool:
    return not isinstance(ids, str) and all(isinstance(i, int | np.integer) and i >= 0 for i in ids)


def _are_texts(stop: Any) -> bool:
    return not isinstance(stop, str) and all(isinstance(text, str) and text for text in stop)


@dataclass(frozen=True)
class Answer:
    text: str  # without spaces around it, as the release returns it
    tokens: int  # generated tokens, a stop token not counted
    finish: str  # "stop": a stop token or string; "length": max_new_tokens; "context": it is full
    ended_by: int | str | None = None  # the stop token or string of a "stop"


class AnswerText:
    """One row's answer while it grows."""

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Iterable[int],
        stop: Sequence[str],
        allowance: int,
        at_allowance: str,
        *,
        quiet: int = 0,
    ):
        """`at_allowance` is the `finish` of an answer that reaches `allowance` tokens; before
        `quiet` tokens no stop string ends it."""
        self.tokenizer, self.stop_ids, self.stop = tokenizer, frozenset(stop_ids), tuple(stop)
        self.allowance, self.at_allowance, self._quiet = allowance, at_allowance, quiet
        self.ids: list[int] = []
        self.text = ""  # what has gone out
        self.finish: str | None = None
        self._ended_by: int | str | None = None
        self._raw = ""  # all text that is settled, spaces and beginnings of stop strings included
        self._window = (0, 0)  # ids up to the second are in `_raw`; the first gives them context

    def cap(self, room: int) -> None:
        """There is room for so many tokens; an answer that fills it ends as the context's end."""
        if self.allowance > room:
            self.allowance, self.at_allowance = room, "context"

    def push(self, ids: Iterable[int]) -> str:
        """The text that becomes certain with some more ids; ids behind the end are ignored."""
        for token in ids:
            if self.finish is not None:
                break
            if int(token) in self.stop_ids:
                self.finish, self._ended_by = "stop", int(token)
                break
            self.ids.append(int(token))
            self._settle()
            if self.finish is None and len(self.ids) >= self.allowance:
                self.finish = self.at_allowance
        shown = self._raw if self.finish else self._raw[: len(self._raw) - self._held()]
        shown = shown.strip()
        piece, self.text = shown[len(self.text) :], shown
        return piece

    @property
    def answer(self) -> Answer:
        assert self.finish is not None
        return Answer(self.text, len(self.ids), self.finish, self._ended_by)

    def _settle(self) -> None:
        """Decodes a small window: what the last ids add to those before them, which settle
        spaces and joins. Bytes that are no whole character yet wait for the next id.
        """
        start, end = self._window
        before, now = self._decode(self.ids[start:end]), self._decode(self.ids[start:])
        if len(now) <= len(before) or now.endswith(BROKEN):
            return
        self._window = (end, len(self.ids))
        old = len(self._raw)
        self._raw += now[len(before) :]
        if len(self.ids) < self._quiet:
            return
        longest = max(map(len, self.stop), default=0)
        # From a little before: a stop string may begin in text that was settled earlier.
        places = [(self._raw.find(stop, max(0, old - longest + 1)), stop) for stop in self.stop]
        if found := [(place, stop) for place, stop in places if place >= 0]:
            place, self._ended_by = min(found)
            self._raw, self.finish = self._raw[:place], "stop"

    def _decode(self, ids: list[int]) -> str:
        with told("the tokenizer", "cannot write what the model said"):
            # The Rust tokenizer itself: its Python shell takes five times as long.
            return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def _held(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self.stop
                for size in range(1, len(stop))
                if self._raw.endswith(stop[:size])
            ),
            default=0,
        )
