"""Prompts: from turns to the exact prompt string, in pieces that say what they are.

    turns + template --pieces--> "USER: " | <image>\\nWhat? | " " | "ASSISTANT:" | " A dog.</s>"
                                  markup    typed             markup              to be learnt

A template is strings of ours, or the tokenizer's own chat template (data/text/chat_template.py),
whose pieces are found by rendering place-holders with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_mini_jax.data.text import chat_template
from llava_mini_jax.data.text.templates import IMAGE_MARK, Template, Turn, check_turns, image_marks
from llava_mini_jax.errors import InputError


@dataclass(frozen=True)
class Piece:
    text: str
    typed: bool = False  # written by a person or a data set, not by the template
    answer: bool = False
    marks: tuple[int, ...] = ()  # the characters at which images stand, of "<image>" each


def _typed(turn: Turn, strip: bool) -> Piece:
    text, marks = turn.text or "", image_marks(turn)
    if strip:
        removed = len(text) - len(text.lstrip())
        text, marks = text.strip(), tuple(mark - removed for mark in marks)
    return Piece(text, typed=True, answer=turn.role == "assistant", marks=marks)


# --- Prompt strings -------------------------------------------------------------------------------


def render(template: Template, turns: Sequence[Turn], tokenizer: Any = None, date: str = "") -> str:
    """The prompt as the release writes it, with "<image>" where an image goes.

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
    found, turns = _picture_first(turns) if template.picture_first else ([], turns)
    found += [Piece(template.system)] if turns[0].role != "system" else []
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


def _picture_first(turns: Sequence[Turn]) -> tuple[list[Piece], Sequence[Turn]]:
    """(the image and a line break, the turns without them); text alone stays as it is."""
    pictures = sum(len(image_marks(turn)) for turn in turns)
    if not pictures:
        return [], turns
    if pictures > 1:
        raise InputError(
            f"{pictures} images are given, but this template takes one, before the conversation:"
            " give one, or another template (--conv-mode, load's template)"
        )

    def on_a_line(turn: Turn) -> Turn:
        text = turn.text
        for mark in reversed(image_marks(turn)):
            text = (text or "")[:mark] + (text or "")[mark + len(IMAGE_MARK) :]
        return Turn(turn.role, text and text.replace("\n", ""), ())

    return [Piece(IMAGE_MARK, marks=(0,)), Piece("\n")], [on_a_line(turn) for turn in turns]


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

        A message is text; templates of models with images want a list of parts. A template that
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
            raise self._no_labels("does not end an answer with a special token or a fixed text")
        return end

    def _no_labels(self, fault: str) -> InputError:
        return InputError(
            f"The tokenizer's chat template {fault}, so the answer's tokens cannot be"
            " identified; use another template (--conv-mode, load's template, prompt.template)."
        )


def _common_start(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(a, b, key=len) if size is None else a[:size]
