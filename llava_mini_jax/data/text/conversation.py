"""Conversations: from turns to the exact prompt string, and from that to ids and labels.

    LLaVA JSON --from_llava--> turns --place_image_mark--> turns
    turns + template --pieces--> "USER: " | <image>\\nWhat? | " " | "ASSISTANT:" | " A dog.</s>"
                                  markup    typed             markup              to be learnt
    the pieces joined --tokenizer, its character offsets--> ids, supervised, answered

Labels come from the same pass that makes the ids: a token is learnt if one of its characters
belongs to an answer. Nothing is tokenised a second time to be counted, which is how LLaVA's own
code loses samples ("tokenization mismatch").
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llava_mini_jax.data.text import question_ids
from llava_mini_jax.data.text.prompt_text import pieces
from llava_mini_jax.data.text.templates import IMAGE_MARK, TEMPLATES, Template, Turn, check_turns
from llava_mini_jax.data.text.tokenizer import told
from llava_mini_jax.errors import InputError

__all__ = ["IMAGE_MARK", "TEMPLATES", "Template", "Turn", "encode", "from_llava"]

IMAGE_TOKEN = -200  # stands for an image among the ids, until its tokens are put there
IGNORE = -100  # the label of a position that is not learnt


@dataclass(frozen=True)
class EncodedPrompt:
    ids: np.ndarray  # [T] int32, IMAGE_TOKEN at each "<image>"
    supervised: np.ndarray  # [T] bool: learnt; nothing is in a prompt that is open at its end
    answered: np.ndarray  # [T] bool: inside any answer, its end token included
    # What each "<image>" is looked at for, in a compressor's vocabulary; (): none reads it.
    questions: tuple[np.ndarray, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        """int32 [T]: the id where it is learnt, IGNORE elsewhere (not shifted)."""
        return np.where(self.supervised, self.ids, IGNORE).astype(np.int32)


# --- LLaVA's data ---------------------------------------------------------------------------------


def from_llava(conversations: Sequence[Any], where: str = "the conversation") -> list[Turn]:
    """Turns from [{"from": "human" | "gpt", "value": str}, ...].

    A first turn of the assistant is dropped, as LLaVA does. `where` names the sample in errors.
    Raises InputError for anything but human and gpt in turn, and for an answer without text.
    """
    roles: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
    if not isinstance(conversations, list | tuple) or not conversations:
        raise InputError(
            f"{where}: its conversations are {conversations!r:.60}; expected a list of turns such"
            ' as {"from": "human", "value": "..."}. Correct or remove the sample.'
        )
    turns: list[Turn] = []
    for i, entry in enumerate(conversations):
        fields = entry if isinstance(entry, dict) else {}
        role, text = roles.get(str(fields.get("from"))), fields.get("value")
        if role is None or not isinstance(text, str):
            raise InputError(
                f"{where}: turn {i + 1} is {entry!r:.80}; expected"
                ' {"from": "human" or "gpt", "value": text}. Correct or remove the sample.'
            )
        if role == "assistant" and not text.strip():
            raise InputError(f"{where}: turn {i + 1} is an empty answer; remove the sample.")
        turns.append(Turn(role, text))
    if turns[0].role == "assistant":
        turns = turns[1:]
    check_turns(turns, where)
    return turns


def place_image_mark(turns: Sequence[Turn], pictures: int) -> list[Turn]:
    """The training rule of LLaVA for "<image>", on every turn that has one.

    One image (or video) in the sample: every mark of the turn is removed, the turn stripped, and
    "<image>\\n" put in front. Several: the marks stay where they are, each on a line of its own.
    """

    def placed(text: str) -> str:
        if pictures == 1:
            return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
        lines = [line.strip() for line in re.split(f"({IMAGE_MARK})", text)]
        return "\n".join(line for line in lines if line)

    return [
        replace(turn, text=placed(turn.text)) if turn.text and IMAGE_MARK in turn.text else turn
        for turn in turns
    ]


def check_images(encoded: EncodedPrompt, pictures: int, where: str) -> None:
    """Raises InputError unless there is one "<image>" for each image (or video)."""
    marks = int((encoded.ids == IMAGE_TOKEN).sum())
    if marks != pictures:
        raise InputError(
            f'{where}: the text has "{IMAGE_MARK}" {marks} times for {pictures} images or videos;'
            " write it once for each."
        )


def check_supervised(encoded: EncodedPrompt, sample_id: Any) -> None:
    """Raises InputError for a training sample from which nothing would be learnt."""
    if not encoded.supervised.any():
        raise InputError(
            f"sample id {sample_id}: none of its {len(encoded.ids)} tokens is part of an answer, so"
            " there is nothing to learn; add an answer, allow more tokens, or remove the sample."
        )


# --- Ids and labels -------------------------------------------------------------------------------


def encode(
    template: Template, turns: Sequence[Turn], tokenizer: Any, *, double_bos: bool, date: str = ""
) -> EncodedPrompt:
    """Ids of the prompt, and which of them are learnt.

    The text between two "<image>" is tokenised by itself, as the release does, with one bos in
    front of everything. What is learnt is what follows an open prompt: for Vicuna that includes
    the space before an answer, for all templates the token that ends it. Control tokens in the
    messages ("<|eot_id|>" typed by a user) are tokenised as the letters that they are, to which a
    SentencePiece tokenizer adds a space; in the release they act as control tokens. The same goes
    for an "<image>" that is none of its turn's `marks`.

    double_bos: the release's inference prompts, where the chat template writes a bos and the
      tokenizer adds another; its training drops one.
    date: what a chat template that asks for it is told; none: the day on which the process began.
    Raises InputError for turns out of order and for a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"The tokenizer ({type(tokenizer).__name__}) gives no character offsets, which labels"
            " are made from; load a fast one with data.text.tokenizer.load_tokenizer."
        )
    parts = pieces(template, turns, tokenizer, date)
    text = "".join(part.text for part in parts)
    lengths = [len(part.text) for part in parts]
    is_answer = np.repeat([part.answer for part in parts], lengths)
    is_typed = np.repeat([part.typed for part in parts], lengths)
    begins = np.cumsum([0, *lengths])
    marks = [
        int(begin) + mark for begin, part in zip(begins, parts, strict=False) for mark in part.marks
    ]
    ids, spans = _tokenize_between_marks(text, is_typed, marks, tokenizer)
    bos = list(_first_ids(tokenizer))
    if bos and (double_bos or ids[: len(bos)] != bos):
        ids, spans = bos + ids, [(0, 0)] * len(bos) + spans
    ids_T = np.array(ids, np.int32)
    answered_T = _overlap(spans, is_answer)
    supervised_T = answered_T & (ids_T != IMAGE_TOKEN) & (turns[-1].text is not None)
    questions = question_ids.of_marks(turns, tokenizer)
    return EncodedPrompt(ids_T, supervised_T, answered_T, questions)


def _tokenize_between_marks(
    text: str, is_typed: np.ndarray, marks: Sequence[int], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, IMAGE_TOKEN for every mark, and the characters [start, end) that each stands for."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for end in [*marks, len(text)]:
        chunk_ids, chunk_spans = _tokenize(text[start:end], is_typed[start:end], tokenizer)
        ids += chunk_ids
        spans += [(start + a, start + b) for a, b in chunk_spans]
        if end < len(text):
            ids.append(IMAGE_TOKEN)
            spans.append((end, end + len(IMAGE_MARK)))
        start = end + len(IMAGE_MARK)
    return ids, spans


def _overlap(spans: list[tuple[int, int]], marked: np.ndarray) -> np.ndarray:
    """bool per span: does it hold a marked character? An empty span holds the one it stands at."""
    count = np.concatenate([[0], np.cumsum(marked)])  # marked characters before each one
    starts_T, ends_T = np.array(spans, np.int64).reshape(-1, 2).T
    ends_T = np.minimum(np.maximum(ends_T, starts_T + 1), len(marked))
    return count[ends_T] > count[np.minimum(starts_T, len(marked))]


@functools.lru_cache(maxsize=8)
def _first_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that this tokenizer's file puts in front of every text; none for some."""
    with told("the tokenizer", "reads nothing"):
        encoding = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
        own = encoding.special_tokens_mask
    return tuple(encoding.ids[: own.index(0)]) if 0 in own else ()


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that no typed text may become; "<image>" is one of a published tokenizer's."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.special or t.content == IMAGE_MARK}


def _tokenize(
    text: str, is_typed: np.ndarray, tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans of a text without image marks, and without an added bos."""
    if not text:
        return [], []
    # The Rust tokenizer itself: its Python shell costs as much again, for options unused here.
    backend = tokenizer.backend_tokenizer
    with told("the tokenizer", "cannot read a text"):
        encoding = backend.encode(text, add_special_tokens=False)
    ids, spans = encoding.ids, encoding.offsets
    special = _special_tokens(tokenizer)
    if not is_typed.any() or special.keys().isdisjoint(ids):
        return ids, spans
    safe_ids: list[int] = []
    safe_spans: list[tuple[int, int]] = []
    for token, (start, end) in zip(ids, spans, strict=True):
        letters, written = [token], text[start:end]
        # Some tokens take the white space around them, which may be the template's.
        inside = slice(start + len(written) - len(written.lstrip()), start + len(written.rstrip()))
        if (
            token in special
            and is_typed[inside].any()
            and _is_written(special[token], written, backend)
        ):
            letters = _as_letters(written, special, backend)
        safe_ids += letters
        safe_spans += [(start, end)] * len(letters)
    return safe_ids, safe_spans


def _is_written(special: str, text: str, backend: Any) -> bool:
    """Whether a special token stands in a text, which may be for what the tokenizer does not know.

    Some tokenizers look for it in a text whose letters they have made small, or plain.
    """
    if special in text or backend.normalizer is None:
        return special in text
    normal = backend.normalizer.normalize_str
    return normal(special) in normal(text)


def _as_letters(written: str, special: dict[int, str], backend: Any) -> list[int]:
    """The ids of a special token that was typed: of its halves, neither of which is special.

    (The tokenizer has a switch for this, but it is state that all threads share.)
    """
    ids = backend.encode(written, add_special_tokens=False).ids
    if special.keys().isdisjoint(ids) or len(written) < 2:
        return ids
    return [
        token
        for half in (written[:1], written[1:])
        for token in _as_letters(half, special, backend)
    ]
