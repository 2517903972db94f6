"""Messages of a chat to turns and media: media stand where their parts stood, text is only text.

    messages --conversation--> turns (system first, if any), each with the places of its media
                         '---> ImagePart, VideoPart, in the order of those places

Parts without white space between them stand on lines of their own, as images do in the prompts
that models are trained with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llava_mini_jax.data.text.conversation import IMAGE_MARK, Turn
from llava_mini_jax.serving.body import shown
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.parts import DETAILS, ImagePart, VideoPart

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
Medium = ImagePart | VideoPart
SUPPORTED = "text, image_url or video_url"


@dataclass(frozen=True)
class Conversation:
    turns: Sequence[Turn]  # the last one is the user's
    marks: Sequence[Sequence[Medium]]  # the media of each mark: one, or images that are a film

    @property
    def media(self) -> list[Medium]:
        return [medium for mark in self.marks for medium in mark]


def conversation(messages: Sequence[Mapping[str, Any]], as_film: bool = False) -> Conversation:
    """Turns and media of a chat; `as_film`: images one behind the other are a film's frames.

    ApiError 400, `param` messages, for what is no conversation: the reason, and where.
    """
    media: list[list[Medium]] = []
    turns: list[Turn] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
        if role is None:
            _refuse(where, f"role is {shown(message.get('role'))}; give {', '.join(ROLES)}")
        text, marks = _content(message.get("content"), role, where, media, as_film)
        if role == "system":
            if turns:
                _refuse(where, "a system message comes after others; put it first")
            system.append(text)
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            _refuse(
                where, f"it is by the {role}; here the {expected}'s is expected (turns alternate)"
            )
        turns.append(Turn("user" if role == "user" else "assistant", text, marks))
    if not turns or turns[-1].role != "user":
        _refuse("messages", "the last one is not the user's; end with what is to be answered")
    if system:
        turns.insert(0, Turn("system", "\n\n".join(system), ()))
    return Conversation(turns, media)


def _content(
    content: Any, role: str, where: str, media: list[list[Medium]], as_film: bool
) -> tuple[str, tuple[int, ...]]:
    """(text, places of its media); the media are added to `media`."""
    if isinstance(content, str):
        return content, ()
    if content is None and role == "assistant":
        return "", ()
    if not isinstance(content, list):
        _refuse(where, f"content is {shown(content)}; give text, or a list of parts")
    text, marks = "", []
    before: Any = None
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        found = part if isinstance(part, str) else _part(part, place)
        follows, before = isinstance(before, ImagePart), found
        if as_film and follows and isinstance(found, ImagePart):
            media[-1].append(found)
            continue
        written = found if isinstance(found, str) else IMAGE_MARK
        if text and written and not text[-1].isspace() and not written[0].isspace():
            text += "\n"
        if not isinstance(found, str):
            if role != "user":
                _refuse(place, f"a message by the {role} has an image; only the user's may")
            marks.append(len(text))
            media.append([found])
        text += written
    return text, tuple(marks)


def _part(part: Any, where: str) -> str | ImagePart | VideoPart:
    if not isinstance(part, dict):
        _refuse(where, f"a part is {shown(part)}; give an object with a type: {SUPPORTED}")
    kind = part.get("type")
    if kind in TEXT_PARTS:
        if not isinstance(part.get("text"), str):
            _refuse(where, f"text is {shown(part.get('text'))}; give a string")
        return part["text"]
    uuid = part.get("uuid")
    if uuid is not None and not (isinstance(uuid, str) and 0 < len(uuid) <= 256):
        _refuse(where, f"uuid is {shown(uuid)}; give a string of 1 to 256 characters")
    if kind in IMAGE_PARTS:
        url, detail = _address(part.get("image_url"), uuid, f"{where}.image_url")
        detail = part.get("detail") if detail is None else detail
        if detail is not None and detail not in DETAILS:
            _refuse(where, f"detail is {shown(detail)}; give {', '.join(DETAILS)}")
        return ImagePart(url, detail or "auto", uuid)
    if kind == "video_url":
        return VideoPart(_address(part.get("video_url"), uuid, f"{where}.video_url")[0], uuid)
    return _refuse(where, f"a part of type {shown(kind)} is not supported; give {SUPPORTED}")


def _address(given: Any, uuid: str | None, where: str) -> tuple[str | None, Any]:
    """(url, detail) of {"url": ...}, or of the short form, the url alone.

    No url is good where a `uuid` says what was sent before.
    """
    fields = given if isinstance(given, dict) else {}
    url = given if isinstance(given, str) else fields.get("url")
    known = url is None and uuid is not None and isinstance(given, dict | None)
    if not known and not isinstance(url, str):
        _refuse(where, 'there is no address; give {"url": "data:...;base64,..."}')
    return url, fields.get("detail")


def _refuse(where: str, reason: str) -> NoReturn:
    raise ApiError(400, f"{where}: {reason}", param="messages")
