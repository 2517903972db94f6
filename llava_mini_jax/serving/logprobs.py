"""Log probabilities in OpenAI's two shapes.

    Token (id, logprob, top) --chat_logprobs--------> {"content": [{token, logprob, bytes, ...}]}
                             --completion_logprobs--> {"tokens", "token_logprobs", "top_logprobs"}

A token may be part of a character: then its bytes say what it is.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from llava_mini_jax.inference.ticket import Token

IMPOSSIBLE = -9999.0  # JSON has no infinity
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def chat_logprobs(tokens: Sequence[Token], tokenizer: Any) -> dict[str, Any]:
    return {
        "content": [
            {
                **_entry(token.id, token.logprob, tokenizer),
                "top_logprobs": [_entry(id, logprob, tokenizer) for id, logprob in token.top],
            }
            for token in tokens
        ]
    }


def completion_logprobs(tokens: Sequence[Token], tokenizer: Any, offset: int) -> dict[str, Any]:
    """`offset` characters stand before the first of the tokens."""
    names = [_name(_bytes(token.id, tokenizer)) for token in tokens]
    offsets = [offset + sum(map(len, names[:number])) for number in range(len(names))]
    return {
        "tokens": names,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {_name(_bytes(id, tokenizer)): _finite(logprob) for id, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _entry(id: int, logprob: float, tokenizer: Any) -> dict[str, Any]:
    content = _bytes(id, tokenizer)
    return {"token": _name(content), "logprob": _finite(logprob), "bytes": list(content)}


def _finite(logprob: float) -> float:
    return float(logprob) if math.isfinite(logprob) else IMPOSSIBLE


def _name(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:  # as OpenAI writes part of a character
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@functools.lru_cache(maxsize=65536)
def _bytes(id: int, tokenizer: Any) -> bytes:
    """What a token stands for in a text."""
    if id in (added := _added(tokenizer)):
        return added[id].encode()
    piece = tokenizer.convert_ids_to_tokens(id) or ""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    letters = _byte_letters(tokenizer)
    if letters and set(piece) <= letters.keys():
        return bytes(letters[letter] for letter in piece)
    return piece.replace("\u2581", " ").encode(errors="replace")


@functools.lru_cache(maxsize=8)
def _added(tokenizer: Any) -> dict[int, str]:
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}


@functools.lru_cache(maxsize=8)
def _byte_letters(tokenizer: Any) -> dict[str, int]:
    """The letters that byte-level tokenizers (GPT-2's, Llama 3's) write bytes with, or none."""
    if "ByteLevel" not in repr(tokenizer.backend_tokenizer.decoder):
        return {}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
