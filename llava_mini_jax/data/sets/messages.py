"""Chat messages of other toolkits (trl, LLaVA-OneVision-1.5) as LLaVA's turns.

    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    {"role": "user", "content": "<image>What?"}
        --turns_of--> {"from": "human", "value": "<image>What?"}

Fields, kinds of content and roles that are not known may change what a model reads or learns, so
each is refused by its name, unless it is empty: tables have every field in every row.
"""

from typing import Any

from llava_mini_jax.data.text.conversation import IMAGE_MARK
from llava_mini_jax.errors import InputError, short

_ROLES = {"user": "human", "assistant": "gpt"}
_KINDS = ("text", "image")


def is_chat(turns: list[Any]) -> bool:
    """Whether turns are messages with a role; LLaVA's say whom they are from."""
    return any(isinstance(turn, dict) and "role" in turn for turn in turns)


def turns_of(messages: list[Any], place: str) -> list[dict[str, str]]:
    """LLaVA's turns. Raises InputError for everything that is not known."""
    found: list[dict[str, str]] = []
    pictures = 0
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict) or "role" not in message:
            raise InputError(f'{where} is {short(message, 60)}; expected {{"role", "content"}}.')
        _refuse_others(message, ("role", "content"), where)
        role = _ROLES.get(str(message["role"]))
        if role is None:
            raise InputError(
                f"{where} is by {short(message['role'], 40)}, which training does not support;"
                f" expected {' or '.join(_ROLES)}. A system message may come before the first"
                " question."
            )
        text = _text(message.get("content"), pictures, where)
        pictures += text.count(IMAGE_MARK)
        found.append({"from": role, "value": text})
    return found


def _text(content: Any, pictures: int, where: str) -> str:
    """A message's content as text with "<image>" for its images, of which as many went before."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} has the content {short(content, 60)}; expected text or a list.")
    said: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _KINDS:
            raise InputError(
                f"{where} has the content {short(part, 80)}; expected"
                ' {"type": "text", "text": ...} or {"type": "image"}.'
            )
        if kind == "text":
            _refuse_others(part, ("type", "text"), where)
            if not isinstance(part.get("text"), str):
                raise InputError(f"{where} has a text that is {short(part.get('text'), 40)}.")
            said.append(part["text"])
            continue
        _refuse_others(part, ("type", "index"), where)
        before = pictures + "".join(said).count(IMAGE_MARK)
        if part.get("index") not in (None, before):
            raise InputError(
                f"{where} shows image {short(part['index'], 20)} where number {before} is due;"
                " images are shown in their order, each once."
            )
        said.append(IMAGE_MARK)
    return "".join(said)


def _refuse_others(fields: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    # An empty text beside an image is how a table has no text there.
    others = [k for k, v in fields.items() if k not in known and v not in (None, "", [], {})]
    if others:
        raise InputError(
            f"{where} has {', '.join(map(repr, others))[:80]}, which is not read; expected"
            f" {' and '.join(known)}. Remove it, or the sample."
        )
