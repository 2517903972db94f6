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

from llava_mini_jax.data.tokenizer import first_line
from llava_mini_jax.errors import InputError

IMAGE_TOKEN = -200  # stands for a picture among the ids, until its tokens are put there
IGNORE = -100  # the label of a position that is not learnt
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str | None  # None, for the assistant at the end only: open, to be generated


@dataclass(frozen=True)
class Template:
    """The strings around the turns. Together they give the release's prompts letter by letter."""

    name: str
    system: str
    user: str
    user_end: str
    assistant: str  # ends an open prompt, so all that follows is what the model has to produce
    answer_gap: str  # between `assistant` and the answer
    answer_end: str
    tail: str = ""  # after a finished conversation
    strip: bool = False  # white space around every message is removed
    bare_user: bool = False  # a user turn is reduced to its image marks (captions)
    own_system: str | None = None  # system message, where the tokenizer's chat template is used


_VICUNA_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the {0}'s questions. "
)
_LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual"
    " content that the user provides, and assist the user with a variety of tasks using natural"
    " language."
)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_PLAIN = Template("plain", "", "", "", "", "", "\n", bare_user=True)
_VICUNA_V1 = Template(
    "vicuna_v1", _VICUNA_SYSTEM.format("user"), "USER: ", " ", "ASSISTANT:", " ", "</s>"
)
_LLAVA_V1 = replace(_VICUNA_V1, name="llava_v1", system=_VICUNA_SYSTEM.format("human"))
# Not the release's: for small models, whose context and time are short.
_BRIEF = replace(_VICUNA_V1, name="brief", system="")
_LLAMA_3 = Template(
    "llama_3",
    f"<|begin_of_text|>{_header('system')}{_LLAMA_SYSTEM}<|eot_id|>",
    _header("user"),
    "<|eot_id|>",
    _header("assistant"),
    "",
    "<|eot_id|>",
)
# The release renders this one with the checkpoint tokenizer's chat template and relies on an
# assistant header at the very end. These are the strings of the original Llama-3-Instruct
# template, which has that header; they serve tokenizers without a chat template.
_LLAMA_3_1 = replace(
    _LLAMA_3, name="llama_3_1", tail=_header("assistant"), strip=True, own_system=_LLAMA_SYSTEM
)
TEMPLATES: dict[str, Template] = {
    "plain": _PLAIN,
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _LLAVA_V1,
    "brief": _BRIEF,
    "llama_3": _LLAMA_3,
    "llava_llama_3": _LLAMA_3,
    "llama_3_1": _LLAMA_3_1,
    "llava_llama_3_1": _LLAMA_3_1,
}


@dataclass(frozen=True)
class EncodedPrompt:
    ids: np.ndarray  # [T] int32, IMAGE_TOKEN at each "<image>"
    supervised: np.ndarray  # [T] bool: learnt; nothing is in a prompt that is open at its end
    answered: np.ndarray  # [T] bool: inside any answer, its end token included

    @property
    def labels(self) -> np.ndarray:
        """int32 [T]: the id where it is learnt, IGNORE elsewhere (not shifted)."""
        return np.where(self.supervised, self.ids, IGNORE).astype(np.int32)


@dataclass(frozen=True)
class _Piece:
    text: str
    typed: bool = False  # written by a person or a data set, not by the template
    answer: bool = False


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
    _check_turns(turns, where)
    return turns


def place_image_mark(turns: Sequence[Turn], pictures: int) -> list[Turn]:
    """The training rule of LLaVA for "<image>", on every turn that has one.

    One picture (or video) in the sample: every mark of the turn is removed, the turn stripped, and
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
    """Raises InputError unless there is one "<image>" for each picture (or video)."""
    marks = int((encoded.ids == IMAGE_TOKEN).sum())
    if marks != pictures:
        raise InputError(
            f'{where}: the text has "{IMAGE_MARK}" {marks} times for {pictures} pictures or videos;'
            " write it once for each."
        )


def check_supervised(encoded: EncodedPrompt, sample_id: Any) -> None:
    """Raises InputError for a training sample from which nothing would be learnt."""
    if not encoded.supervised.any():
        raise InputError(
            f"sample id {sample_id}: none of its {len(encoded.ids)} tokens is part of an answer, so"
            " there is nothing to learn; add an answer, allow more tokens, or remove the sample."
        )


# --- Prompt strings -------------------------------------------------------------------------------


def render(template: Template, turns: Sequence[Turn], tokenizer: Any = None) -> str:
    """The prompt as the release writes it, with "<image>" where a picture goes.

    `tokenizer` only matters for llama_3_1: its own chat template is used if it has one.
    """
    return "".join(piece.text for piece in _pieces(template, turns, tokenizer))


def _check_turns(turns: Sequence[Turn], where: str) -> None:
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise InputError(
                f"{where}: turn {i + 1} is by the {turn.role} where the {expected}'s is expected;"
                " user and assistant take turns, the user begins."
            )
        if turn.text is None and (turn.role == "user" or i + 1 < len(turns)):
            raise InputError(
                f"{where}: turn {i + 1} has no text; only the assistant's last turn may be open."
            )
    if not turns:
        raise InputError(f"{where}: there are no turns; begin with one by the user.")


def _pieces(template: Template, turns: Sequence[Turn], tokenizer: Any) -> list[_Piece]:
    _check_turns(turns, "the conversation")
    if template.own_system is not None and getattr(tokenizer, "chat_template", None):
        return _chat_pieces(template.own_system, turns, tokenizer)
    pieces = [_Piece(template.system)]
    for turn in turns:
        text = turn.text
        if text is not None and template.strip:
            text = text.strip()
        if turn.role == "user":
            if template.bare_user:
                text = IMAGE_MARK * (text or "").count(IMAGE_MARK)
            pieces += [_Piece(template.user), _Piece(text or "", typed=True)]
            pieces += [_Piece(template.user_end)]
        else:
            pieces += [_Piece(template.assistant)]
            if text is not None:
                pieces += [_Piece(template.answer_gap, answer=True)]
                pieces += [_Piece(text, typed=True, answer=True)]
                pieces += [_Piece(template.answer_end, answer=True)]
    if turns[-1].text is not None:
        pieces += [_Piece(template.tail)]
    return pieces


def _chat_pieces(system: str, turns: Sequence[Turn], tokenizer: Any) -> list[_Piece]:
    """The pieces of the tokenizer's own chat template, found by rendering place-holders with it."""
    is_open = turns[-1].text is None
    spoken = [turn for turn in turns if turn.text is not None]

    def rendered(texts: list[str]) -> str:
        messages = [{"role": "system", "content": system}]
        messages += [{"role": t.role, "content": x} for t, x in zip(spoken, texts, strict=True)]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # a template is the tokenizer author's program; jinja2 may miss
            raise InputError(
                f"The tokenizer's chat template fails: {first_line(error)}."
            ) from error

    # The spaces around a place-holder disappear if the template strips its messages.
    marked = rendered([f" \ue000{i}\ue001 " for i in range(len(spoken))])
    markup = re.split(r"( ?)\ue000\d+\ue001 ?", marked)
    specials = {t.content for t in tokenizer.added_tokens_decoder.values()}
    pieces = [_Piece(markup[0])]
    for turn, space, after in zip(spoken, markup[1::2], markup[2::2], strict=False):
        text = turn.text or ""
        answer = turn.role == "assistant"
        pieces += [_Piece(text if space else text.strip(), typed=True, answer=answer)]
        # An answer ends with the special token that directly follows it.
        end = max((len(s) for s in specials if after.startswith(s)), default=0) if answer else 0
        pieces += [_Piece(after[:end], answer=True), _Piece(after[end:])]
        if answer and not end:
            raise InputError(
                "The tokenizer's chat template does not end an answer with a special token, so"
                " labels cannot be made; use another template name."
            )
    if "".join(p.text for p in pieces) != rendered([turn.text or "" for turn in spoken]):
        raise InputError(
            "The tokenizer's chat template changes the text of the messages, so labels cannot be"
            " made; use another template name."
        )
    return pieces


# --- Ids and labels -------------------------------------------------------------------------------


def encode(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Any,
    *,
    double_bos: bool,
    typed_specials: bool = False,
) -> EncodedPrompt:
    """Ids of the prompt, and which of them are learnt.

    The text between two "<image>" is tokenised by itself, as the release does, with one bos in
    front of everything. What is learnt is what follows an open prompt: for Vicuna that includes
    the space before an answer, for all templates the token that ends it.

    double_bos: the release's inference prompts, where the chat template writes a bos and the
      tokenizer adds another; its training drops one.
    typed_specials: control tokens in the messages ("<|eot_id|>" typed by a user) act as such, as
      in the release. Otherwise they are tokenised as the letters that they are (to which a
      SentencePiece tokenizer adds a space).
    Raises InputError for turns out of order and for a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"The tokenizer ({type(tokenizer).__name__}) gives no character offsets, which labels"
            " are made from; load a fast one with llava_mini_jax.data.tokenizer.load_tokenizer."
        )
    pieces = _pieces(template, turns, tokenizer)
    text = "".join(piece.text for piece in pieces)
    lengths = [len(piece.text) for piece in pieces]
    is_answer = np.repeat([piece.answer for piece in pieces], lengths)
    is_typed = np.repeat([piece.typed and not typed_specials for piece in pieces], lengths)
    marks = [match.start() for match in re.finditer(IMAGE_MARK, text)]

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

    bos = _first_id(tokenizer)
    if bos == [tokenizer.bos_token_id] and (double_bos or ids[:1] != bos):
        ids, spans = bos + ids, [(0, 0), *spans]
    ids_T = np.array(ids, np.int32)
    answered_T = _overlap(spans, is_answer)
    supervised_T = answered_T & (ids_T != IMAGE_TOKEN) & (turns[-1].text is not None)
    return EncodedPrompt(ids_T, supervised_T, answered_T)


def _overlap(spans: list[tuple[int, int]], marked: np.ndarray) -> np.ndarray:
    """bool per span: does it hold a marked character? An empty span holds the one it stands at."""
    count = np.concatenate([[0], np.cumsum(marked)])
    starts_T, ends_T = np.array(spans, np.int64).reshape(-1, 2).T
    ends_T = np.minimum(np.maximum(ends_T, starts_T + 1), len(marked))
    return count[ends_T] > count[np.minimum(starts_T, len(marked))]


@functools.lru_cache(maxsize=8)
def _first_id(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts in front of every text; none for some."""
    return tokenizer("").input_ids[:1]


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _tokenize(
    text: str, is_typed: np.ndarray, tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans of a text without image marks, and without an added bos."""
    if not text:
        return [], []
    # The Rust tokenizer itself: its Python shell costs as much again, for options unused here.
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids, spans = encoding.ids, encoding.offsets
    special = _special_tokens(tokenizer)
    if not is_typed.any() or special.keys().isdisjoint(ids):
        return ids, spans
    safe_ids: list[int] = []
    safe_spans: list[tuple[int, int]] = []
    for token, (start, end) in zip(ids, spans, strict=True):
        letters = [token]
        if token in special and special[token] in text[start:end] and is_typed[start:end].all():
            # In two halves, neither of which is a special token. (The tokenizer has a switch for
            # this, but it is state that all threads share.)
            written = special[token]
            halves = tokenizer([written[:1], written[1:]], add_special_tokens=False).input_ids
            letters = halves[0] + halves[1]
        safe_ids += letters
        safe_spans += [(start, end)] * len(letters)
    return safe_ids, safe_spans
