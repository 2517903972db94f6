"""The words that a judge is asked with: ours, or the official ones from a file the user has.

    ours (own_texts.py) -----------------------------------------.
    FILE.json: {"name": "text"}, or LLaVA's rule.json -----------+--> Wording; by SHA-256, whose
    an official script, or a folder of them (read, never run) ---'

Wording is part of the protocol: other words give other scores. We ship our own, which ask for the
same scale and the same form of reply, so that the official parsers read what comes back. Official
texts stay with their authors. In a user's files they are recognised by digests (own_texts.py);
a score says "official", "ours" or "unknown wording".

Texts hold {places}, such as {question}; other braces stand for themselves.
"""

import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError

_PLACE = re.compile(r"\{([a-z]+[0-9]?)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wording:
    label: str  # "official", "ours", "unknown wording"
    texts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Tells unknown wordings apart."""
        return sha256(json.dumps(dict(self.texts), sort_keys=True))


def read_wording(
    path: Path | None, ours: Mapping[str, str], official: Mapping[str, str], source: str
) -> Wording:
    """The texts named in `ours`, from a file (None: ours themselves).

    In JSON a text is a string, or an object that has it as "prompt", as in LLaVA's rule.json; other
    entries are passed over. In Python scripts only official texts are found. Raises InputError for
    texts that are not there or lack a place to fill.
    """
    if path is None:
        return Wording(label="ours", texts=ours)
    try:
        if path.is_dir() or path.suffix == ".py":
            given = _from_scripts(path, official)
        else:
            given = json.loads(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise InputError(f"the judge's wording {path} cannot be read: {error}") from error
    texts = {name: _text(given, name) for name in ours}
    lacking = [name for name, text in texts.items() if text is None]
    if lacking:
        raise InputError(
            f'the judge\'s wording {path} has no text {", ".join(lacking)}; expected {{"name":'
            f' "text"}} with {", ".join(ours)}, from {source}'
        )
    found = {name: text for name, text in texts.items() if text is not None}
    for name, text in found.items():
        if absent := sorted(set(_PLACE.findall(ours[name])) - set(_PLACE.findall(text))):
            places = ", ".join(f"{{{place}}}" for place in absent)
            raise InputError(
                f'the judge\'s wording {path}, "{name}", has no place {places}; write it where the'
                " script puts that text"
            )
    known = all(sha256(text) == official[name] for name, text in found.items())
    label = "official" if known else "ours" if found == ours else "unknown wording"
    return Wording(label=label, texts=found)


def fill(text: str, **values: str) -> str:
    """The text with its places filled; what fills them is not looked at again."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), text)


def messages(user: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _from_scripts(path: Path, official: Mapping[str, str]) -> dict[str, str]:
    """The official texts among the literals of a script, or of all scripts below a folder."""
    names = {digest: name for name, digest in official.items()}
    found = {}
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_bytes())):
            text = _literal(node)
            for one in (text, text.removeprefix("\n")):
                if (digest := sha256(one)) in names:
                    found[names[digest]] = one
    return found


def _literal(node: ast.AST) -> str:
    """A string of a script; what an f-string fills in becomes a {place}. "" of anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return f"{{{node.value.id}}}"
    return ""


def _text(given: Any, name: str) -> str | None:
    value = given.get(name) if isinstance(given, dict) else None
    if isinstance(value, dict):
        value = value.get("prompt")
    return value if isinstance(value, str) else None
