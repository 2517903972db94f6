"""The JSON of answers: of a chat and of a completion, whole and in chunks.

Said (text, tokens, finish of a choice) --whole--> chat.completion | text_completion
Piece of a choice --first, piece, last--> chat.completion.chunk, ... | text_completion, ...
"""

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_mini_jax.inference.ticket import Piece, Token
from llava_mini_jax.serving.logprobs import chat_logprobs, completion_logprobs

FINISH = {"stop": "stop", "length": "length", "context": "length"}


@dataclass
class Said:
    """A choice as far as it has been told."""

    stops: Collection[str | int] = ()  # texts and tokens that the request wants it to end at
    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # where log probabilities were asked for
    count: int = 0
    finish: str | None = None
    stop_reason: str | int | None = None  # vLLM's: which of `stops` ended it; None: none of them
    begun: bool = False  # a chunk of it has gone out

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.count += piece.count
        if piece.answer is not None:
            self.count, self.finish = piece.answer.tokens, FINISH[piece.answer.finish]
            if piece.answer.ended_by in self.stops:
                self.stop_reason = piece.answer.ended_by


class ChatShape:
    """Of one request; what its chunks share is made once."""

    def __init__(self, model: str, fingerprint: str, tokenizer: Any, with_logprobs: bool):
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._shared = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, said: Sequence[Said]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.tokens),
                "finish_reason": one.finish,
                "stop_reason": one.stop_reason,
            }
            for index, one in enumerate(said)
        ]
        return {**self._shared, "object": "chat.completion", "choices": choices}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, tokens)

    def last(self, index: int, said: Said) -> dict[str, Any]:
        chunk = self._chunk(index, {}, finish=said.finish)
        chunk["choices"][0]["stop_reason"] = said.stop_reason
        return chunk

    def behind(self) -> dict[str, Any]:
        """The chunk of no choice, for what is told of the request."""
        return {**self._shared, "object": "chat.completion.chunk", "choices": []}

    def _chunk(
        self, index: int, delta: dict[str, str], tokens: Sequence[Token] = (), finish: Any = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish,
        }
        return {**self.behind(), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._tokenizer) if self._with_logprobs else None


class CompletionShape:
    def __init__(self, model: str, fingerprint: str, tokenizer: Any, with_logprobs: bool):
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._offsets: dict[int, int] = {}  # characters of each choice that went out
        self._shared = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, said: Sequence[Said]) -> dict[str, Any]:
        choices = [
            {
                **self._choice(index, one.text, one.tokens, one.finish),
                "stop_reason": one.stop_reason,
            }
            for index, one in enumerate(said)
        ]
        return {**self._shared, "choices": choices}

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {**self._shared, "choices": [self._choice(index, text, tokens, None)]}

    def last(self, index: int, said: Said) -> dict[str, Any]:
        choice = {**self._choice(index, "", (), said.finish), "stop_reason": said.stop_reason}
        return {**self._shared, "choices": [choice]}

    def behind(self) -> dict[str, Any]:
        return {**self._shared, "choices": []}

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs and tokens:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(tokens, self._tokenizer, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
