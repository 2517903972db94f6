"""Chat templates: where a folder has one, and what it makes of a conversation.

chat_template.jinja, tokenizer_config.json, chat_template.json --find--> its text
its text, messages, special tokens, the run's date --apply--> the prompt (in a process of its own)
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data.text.guarded import GUARDED, Refused
from llava_mini_jax.errors import InputError

# One rendering takes about a millisecond. The prompt may be longer than its messages by as much as
# the longest published templates write, and more.
_SECONDS, _MEGABYTES, _MARKUP = 1.0, 256, 200_000


class TooMuch(InputError):  # noqa: N818
    """A template takes more time or memory, or writes more, than any that is meant well."""


def find(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The folder's chat template, in transformers' order: chat_template.jinja, then
    tokenizer_config.json, then chat_template.json, which older processors have.

    One text, or several by name if none of them is named "default". Raises InputError for what is
    neither.
    """
    found = _read(folder / "chat_template.jinja")
    if found is not None:
        return found or None
    place, found = "tokenizer_config.json", tokenizer_config.get("chat_template")
    if found is None and (text := _read(folder / "chat_template.json")) is not None:
        place = "chat_template.json"
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(
                f"{folder / place} is not valid json ({error}); restore or remove it"
            ) from error
        found = values.get("chat_template") if isinstance(values, dict) else values
    more = folder / "additional_chat_templates"
    if found is None and more.is_dir() and (names := sorted(p.stem for p in more.glob("*.jinja"))):
        found = {name: _read(more / f"{name}.jinja") for name in names}
        place = "additional_chat_templates"
    return None if found is None else _checked(found, str(folder / place)) or None


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore or remove it") from error


def _checked(found: Any, where: str) -> str | dict[str, str]:
    named = found
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {str(entry.get("name")): entry.get("template") for entry in found}
    if isinstance(named, dict):
        if named and all(isinstance(text, str) for text in named.values()):
            return named.get("default", named)
    elif isinstance(named, str):
        return named
    raise InputError(
        f"{where}: its chat_template is {found!r:.60}; expected the text of a template, or"
        ' a list of {"name": text, "template": text}; correct or remove it'
    )


def of_tokenizer(tokenizer: Any) -> str | None:
    """The text of a tokenizer's own chat template; None if it has none.

    Raises InputError where it has several, and none of them is the one to be used.
    """
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        return None
    text = _checked(found, "the tokenizer")
    if isinstance(text, dict):
        raise InputError(
            f"the tokenizer's chat templates are named {', '.join(text)}, and none is called"
            ' "default"; give that name to the one to use, or choose another template (--conv-mode,'
            " load's template)"
        )
    return text


def asks_for_date(tokenizer: Any) -> bool:
    return "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None) or "")


@functools.cache
def today() -> str:
    """The day on which this process first asked, for as long as it runs: "2024-07-26"."""
    return datetime.date.today().isoformat()


def apply(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, is_open: bool, date: str
) -> str:
    """What the tokenizer's chat template makes of the messages; without a `date`, of `today()`.

    The same as transformers' apply_chat_template with `enable_thinking=False`, but for its
    `strftime_now`, which knows the run's day only. Raises InputError where it fails, takes
    seconds, or writes without end.
    """
    template = of_tokenizer(tokenizer)
    assert template is not None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    tokens = {name: token for name, token in tokens.items() if name.endswith("_token")}
    given = {
        "template": template,
        "messages": [dict(message) for message in messages],
        "is_open": is_open,
        "tokens": tokens,
        "date": date or today(),
    }
    outcome = _outcome(json.dumps(given))
    if isinstance(outcome, str):
        return outcome
    raise (TooMuch if outcome.limit else InputError)(
        f"The tokenizer's chat template fails: {outcome}; use another template (--conv-mode,"
        " load's template), or mend the tokenizer's."
    )


@functools.lru_cache(maxsize=256)
def _outcome(request: str) -> str | Refused:
    given = json.loads(request)
    longest = _MARKUP + 8 * len(json.dumps(given["messages"]))
    try:
        return GUARDED.do(
            "render", {**given, "longest": longest}, seconds=_SECONDS, megabytes=_MEGABYTES
        )
    except Refused as error:
        return error
