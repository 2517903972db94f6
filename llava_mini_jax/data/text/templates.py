"""Prompt templates: from turns to the exact prompt string, in pieces that say what they are.

    turns + template --pieces--> "USER: " | <image>\\nWhat? | " " | "ASSISTANT:" | " A dog.</s>"
                                  markup    typed             markup              to be learnt

A template is strings of ours, or the tokenizer's own chat template (data/text/chat_template.py),
whose pieces are found by rendering place-holders with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_mini_jax.data.text import chat_template
from llava_mini_jax.errors import InputError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """What one side says; "<image>" in a user's text is where a picture or video stands.

    Where strangers write the text, `marks` are the characters at which those "<image>" begin, in
    their order: every other one is text like any other. The first turn may be a system message,
    which takes the place of the template's own.
    """

    role: Literal["system", "user", "assistant"]
    text: str | None  # None, for the assistant at the end only: open, to be generated
    marks: tuple[int, ...] | None = None  # None: every "<image>" is one


@dataclass(frozen=True, kw_only=True)
class Template:
    """The strings around the turns. Together they give the release's prompts letter by letter."""

    name: str
    system: str = ""
    # What stands around a conversation's own system message, in the place of `system`; None: that
    # message stands in front of the first question.
    own_around: tuple[str, str] | None = None
    user: str = ""
    user_end: str = ""
    assistant: str = ""  # ends an open prompt, so all that follows is for the model to produce
    answer_gap: str = ""  # between `assistant` and the answer
    answer_end: str = ""
    tail: str = ""  # after a finished conversation
    strip: bool = False  # white space around every message is removed
    bare_user: bool = False  # a user turn is reduced to its image marks (captions)
    own_system: str | None = None  # system message, where the tokenizer's chat template is used
    only_own: bool = False  # it has no strings: the tokenizer must have a chat template


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


_PLAIN = Template(name="plain", answer_end="\n", bare_user=True)
_VICUNA_V1 = Template(
    name="vicuna_v1",
    system=_VICUNA_SYSTEM.format("user"),
    own_around=("", " "),
    user="USER: ",
    user_end=" ",
    assistant="ASSISTANT:",
    answer_gap=" ",
    answer_end="</s>",
)
_LLAVA_V1 = replace(_VICUNA_V1, name="llava_v1", system=_VICUNA_SYSTEM.format("human"))
# Not the release's: for small models, whose context and time are short.
_BRIEF = replace(_VICUNA_V1, name="brief", system="")
_LLAMA_3 = Template(
    name="llama_3",
    system=f"<|begin_of_text|>{_header('system')}{_LLAMA_SYSTEM}<|eot_id|>",
    own_around=(f"<|begin_of_text|>{_header('system')}", "<|eot_id|>"),
    user=_header("user"),
    user_end="<|eot_id|>",
    assistant=_header("assistant"),
    answer_end="<|eot_id|>",
)
# The release renders this one with the checkpoint tokenizer's chat template and relies on an
# assistant header at the very end. These are the strings of the original Llama-3-Instruct
# template, which has that header; they serve tokenizers without a chat template.
_LLAMA_3_1 = replace(
    _LLAMA_3, name="llama_3_1", tail=_header("assistant"), strip=True, own_system=_LLAMA_SYSTEM
)
# The tokenizer's own, whatever it is, with the release's system message.
_CHAT = Template(name="chat", own_system=_LLAMA_SYSTEM, only_own=True)
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
    "chat": _CHAT,
}


@dataclass(frozen=True)
class Piece:
    text: str
    typed: bool = False  # written by a person or a data set, not by the template
    answer: bool = False
    marks: tuple[int, ...] = ()  # the characters at which pictures stand, of "<image>" each


def image_marks(turn: Turn) -> tuple[int, ...]:
    """The characters at which pictures stand in a turn."""
    if turn.marks is not None:
        return turn.marks
    return tuple(match.start() for match in re.finditer(IMAGE_MARK, turn.text or ""))


def _typed(turn: Turn, strip: bool) -> Piece:
    text, marks = turn.text or "", image_marks(turn)
    if strip:
        removed = len(text) - len(text.lstrip())
        text, marks = text.strip(), tuple(mark - removed for mark in marks)
    return Piece(text, typed=True, answer=turn.role == "assistant", marks=marks)


# --- Prompt strings -------------------------------------------------------------------------------


def render(template: Template, turns: Sequence[Turn], tokenizer: Any = None, date: str = "") -> str:
    """The prompt as the release writes it, with "<image>" where a picture goes.

    `tokenizer` and `date` ("2024-07-26"; none: today) only matter for chat and llama_3_1, which use
    its own chat template: llama_3_1 if there is one, chat always.
    """
    return "".join(piece.text for piece in pieces(template, turns, tokenizer, date))


def is_own(template: Template, tokenizer: Any) -> bool:
    """Whether prompts are written by the tokenizer's own chat template; InputError if it must be,
    and there is none."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if template.only_own and not has:
        raise InputError(
            f'the template "{template.name}" is the tokenizer\'s own chat template, but the'
            " tokenizer has none: give another template (--conv-mode, load's template), or put a"
            " chat_template.jinja into the folder"
        )
    return has and template.own_system is not None


def check_turns(turns: Sequence[Turn], where: str) -> None:
    """Raises InputError unless user and assistant take turns and only the end is open."""
    first = 1 if turns and turns[0].role == "system" else 0
    for i, turn in enumerate(turns):
        expected = "assistant" if (i - first) % 2 else "user"
        expected = "system" if i < first else expected
        if turn.role != expected:
            raise InputError(
                f"{where}: turn {i + 1} is by the {turn.role} where the {expected}'s is expected;"
                " user and assistant take turns, the user begins."
            )
        if turn.text is None and (turn.role != "assistant" or i + 1 < len(turns)):
            raise InputError(
                f"{where}: turn {i + 1} has no text; only the assistant's last turn may be open."
            )
        after = 0
        for mark in turn.marks or ():
            if mark < after or not (turn.text or "").startswith(IMAGE_MARK, mark):
                raise InputError(
                    f'{where}: turn {i + 1} has a mark at character {mark}, where no "{IMAGE_MARK}"'
                    " of its own begins; give the places of those in the text, in their order."
                )
            after = mark + len(IMAGE_MARK)
    if not turns[first:]:
        raise InputError(f"{where}: there are no turns; begin with one by the user.")


def pieces(
    template: Template, turns: Sequence[Turn], tokenizer: Any, date: str = ""
) -> list[Piece]:
    """The prompt in pieces, in their order; put together they are `render`'s."""
    check_turns(turns, "the conversation")
    own, own_system = is_own(template, tokenizer), turns[0].role == "system"
    if own and own_system:
        return _with_own_system(_ChatTemplate(template, tokenizer, date), turns)
    if own:
        return _ChatTemplate(template, tokenizer, date).pieces(turns)
    if own_system and template.own_around is None:
        turns = _without_system(turns)
    found = [Piece(template.system)] if turns[0].role != "system" else []
    for turn in turns:
        typed = _typed(turn, template.strip)
        if turn.role == "system":
            before, behind = template.own_around or ("", "")
            found += [Piece(before), typed, Piece(behind)]
        elif turn.role == "user":
            if template.bare_user:
                typed = _typed(Turn("user", IMAGE_MARK * len(typed.marks)), strip=False)
            found += [Piece(template.user), typed, Piece(template.user_end)]
        else:
            found += [Piece(template.assistant)]
            if turn.text is not None:
                found += [Piece(template.answer_gap, answer=True), typed]
                found += [Piece(template.answer_end, answer=True)]
    if turns[-1].text is not None:
        found += [Piece(template.tail)]
    return found


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """The system message as the beginning of the first question."""
    system, first, *others = turns
    before = f"{system.text}\n\n"
    marks = tuple(len(before) + mark for mark in image_marks(first))
    return [Turn("user", before + (first.text or ""), marks), *others]


# --- The tokenizer's own chat template ------------------------------------------------------------


def _with_own_system(template: "_ChatTemplate", turns: Sequence[Turn]) -> list[Piece]:
    try:
        return template.pieces(turns)
    except chat_template.TooMuch:
        raise
    except InputError:  # a chat template that takes no system message, or hides it
        return template.pieces(_without_system(turns))


class _ChatTemplate:
    """A tokenizer's chat template, taken apart by rendering place-holders with it."""

    def __init__(self, template: Template, tokenizer: Any, date: str):
        self.template, self.tokenizer, self.date = template, tokenizer, date

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        is_open = turns[-1].text is None
        spoken = [turn for turn in turns if turn.text is not None]
        roles = [turn.role for turn in spoken]
        write = self._way_to_write(roles, is_open)
        markup = self._markup(write, len(roles))
        end = self._answer_end() if "assistant" in roles else ""
        pieces = [Piece(markup[0])]
        for turn, space, after in zip(spoken, markup[1::2], markup[2::2], strict=True):
            answer = turn.role == "assistant"
            pieces += [_typed(turn, strip=not space)]
            size = len(end) if answer else 0
            pieces += [Piece(after[:size], answer=True), Piece(after[size:])]
            if answer and not after.startswith(end):
                raise self._no_labels("ends the answers of one conversation in different ways")
        if "".join(p.text for p in pieces) != write([turn.text or "" for turn in spoken]):
            raise self._no_labels("changes the text of the messages")
        return pieces

    def _way_to_write(self, roles: Sequence[str], is_open: bool) -> Callable[[Sequence[str]], str]:
        """Messages to the prompt, in the form that this template reads.

        A message is text; templates of models with pictures want a list of parts. A template that
        takes no system message gets none, if nothing else is to be had.
        """

        given = "system" in roles  # then it stands among the texts

        def way(with_system: bool, in_parts: bool) -> Callable[[Sequence[str]], str]:
            def write(texts: Sequence[str]) -> str:
                own = with_system and not given
                told = [("system", self.template.own_system)] if own else []
                told += zip(roles, texts, strict=True)
                messages = [
                    {"role": r, "content": [{"type": "text", "text": x}] if in_parts else x}
                    for r, x in told
                ]
                return chat_template.apply(
                    self.tokenizer, messages, is_open=is_open, date=self.date
                )

            return write

        problem: InputError | None = None
        for with_system in (True, False) if self.template.only_own else (True,):
            for in_parts in (False, True):
                write = way(with_system, in_parts)
                try:
                    self._markup(write, len(roles))
                    return write
                except chat_template.TooMuch:
                    raise
                except InputError as error:
                    problem = problem or error
        assert problem is not None
        raise problem

    def _markup(self, write: Callable[[Sequence[str]], str], count: int) -> list[str]:
        """What stands before, between and behind the messages; with a space where they keep
        theirs: [before, space, between, space, ..., behind]."""
        # The spaces around a place-holder disappear if the template strips its messages.
        marked = write([f" \ue000{i}\ue001 " for i in range(count)])
        found = [int(number) for number in re.findall("\ue000(\\d+)\ue001", marked)]
        if found != list(range(count)):
            raise self._no_labels("leaves messages out, repeats them, or changes their order")
        return re.split("( ?)\ue000\\d+\ue001 ?", marked)

    def _answer_end(self) -> str:
        """What ends every answer: behind the last one and before the next question, up to the
        first special token."""
        roles = ("user", "assistant") * 2
        markup = self._markup(self._way_to_write(roles, is_open=False), len(roles))
        shared = _common_start(markup[4], markup[8])
        specials = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        places = [(shared.find(s), -len(s), s) for s in specials if s and s in shared]
        if places:
            place, _, special = min(places)
            return shared[: place + len(special)]
        if not (end := shared.rstrip()):
            raise self._no_labels(
                "does not end an answer with a special token or a text of its own"
            )
        return end

    def _no_labels(self, fault: str) -> InputError:
        return InputError(
            f"The tokenizer's chat template {fault}, so it cannot be told which tokens are the"
            " answer; use another template (--conv-mode, load's template, prompt.template)."
        )


def _common_start(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(a, b, key=len) if size is None else a[:size]
