"""Turns of a conversation, and the templates that prompts are written by.

    Turn, Turn, ... + TEMPLATES["vicuna_v1"] --prompt_text.py--> "... USER: <image>\\nWhat? ..."

A template is strings of ours, or says that the tokenizer's own chat template is to be used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava_mini_jax.errors import InputError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """What one side says; "<image>" in a user's text marks the place of an image or video.

    For untrusted text, `marks` are the characters at which the real "<image>" marks begin, in
    order; any other "<image>" is plain text. The first turn may be a system message,
    which replaces the template's own.
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
    # The one image stands in front of everything, and messages lose their line breaks.
    picture_first: bool = False
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
# VoCo-LLaMA's, whose text sees of an image, and of all in front of it, its last tokens alone. What
# stands between image and text is the compressor's, but for the line break at its end.
_VOCO_V1 = replace(
    _VICUNA_V1,
    name="voco_v1",
    system=_VICUNA_SYSTEM.format("user").replace("assistant. The", "assistant of the image. The"),
    picture_first=True,
)
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
# The same with an empty system message, for the same reason as `brief`.
_CHAT_BRIEF = replace(_CHAT, name="chat_brief", own_system="")
TEMPLATES: dict[str, Template] = {
    "plain": _PLAIN,
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _LLAVA_V1,
    "voco_v1": _VOCO_V1,
    "brief": _BRIEF,
    "llama_3": _LLAMA_3,
    "llava_llama_3": _LLAMA_3,
    "llama_3_1": _LLAMA_3_1,
    "llava_llama_3_1": _LLAMA_3_1,
    "chat": _CHAT,
    "chat_brief": _CHAT_BRIEF,
}


def image_marks(turn: Turn) -> tuple[int, ...]:
    """The characters at which images stand in a turn."""
    if turn.marks is not None:
        return turn.marks
    return tuple(match.start() for match in re.finditer(IMAGE_MARK, turn.text or ""))


def check_turns(turns: Sequence[Turn], where: str) -> None:
    """Raises InputError unless user and assistant take turns and only the end is open."""
    first = 1 if turns and turns[0].role == "system" else 0
    for i, turn in enumerate(turns):
        expected = "assistant" if (i - first) % 2 else "user"
        expected = "system" if i < first else expected
        if turn.role != expected:
            raise InputError(
                f"{where}: turn {i + 1} is by the {turn.role} where the {expected}'s is expected;"
                " turns alternate and the user begins."
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
                    " begins; give the places of those in the text, in order."
                )
            after = mark + len(IMAGE_MARK)
    if not turns[first:]:
        raise InputError(f"{where}: there are no turns; begin with one by the user.")
