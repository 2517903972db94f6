"""Json files of Hugging Face folders, read field by field.

    config.json --read_json--> values --Fields--> get, size, only, object: checked, noted as read
                                                        |
                                  finish: every other field with a value is refused by name

A field that nobody reads may be the one that changes the arithmetic (Granite's multipliers, a
sliding window, a soft cap on logits), and a model that ignores it computes other numbers in
silence. So the readers state every field they know, the harmless ones too; the rest is an error.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError, short

SECTION = "llava_mini_jax"  # our own section of config.json

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"} | {
    dict: "an object",
    list: "a list",
}


def read_json(path: Path) -> dict[str, Any]:
    """A json object from a file, or an InputError that says what is wrong with it."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: a model folder needs it; check the folder's name")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not json, not UTF-8, or thousands of brackets
        raise InputError(f"{path} is not valid json ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a json object")
    return value


@contextlib.contextmanager
def described_in(where: str) -> Iterator[None]:
    """What a part's own configuration raises, as a sentence about the file."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where} does not describe a model: {error}") from error


class Fields:
    """A json object whose fields are missing, of another type or unknown only with an InputError.

    `defaults` are the values of fields that the writer leaves out; null counts as left out.
    """

    def __init__(self, values: dict[str, Any], where: str, defaults: dict[str, Any] | None = None):
        self.values, self.where, self.defaults = values, where, defaults or {}
        self._known: set[str] = set()

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """The field as `kind`; InputError if it is missing without default, or of another type."""
        self._known.add(name)
        value = self.values.get(name)
        if value is None:
            value = self.defaults.get(name, default)
        # Not None, which callers give as a default.
        if value is ...:
            raise InputError(f'{self.where} has no field "{name}" ({_WORDS[kind]}); add it')
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        wrong_bool = kind is int and isinstance(value, bool)  # Python's True is an int
        infinite = kind is float and isinstance(value, float) and not math.isfinite(value)
        if value is not None and (not isinstance(value, kind) or wrong_bool or infinite):
            raise self.wrong(name, _WORDS[kind])
        return value

    def size(self, name: str, default: Any = ...) -> Any:
        """A whole number from 1 on: a width, a count of layers, a side in pixels."""
        value = self.get(name, int, default)
        if value is not None and not 1 <= value < 2**31:
            raise self.wrong(name, "a whole number from 1 on")
        return value

    def positive(self, name: str, default: Any = ...) -> float:
        value = self.get(name, float, default)
        if value <= 0:
            raise self.wrong(name, "a number above 0")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """A json object, None where the field is absent, null or empty."""
        return self.get(name, dict, None) or None

    def only(self, name: str, *allowed: Any, because: str) -> None:
        """Refuses a field whose value is none of `allowed` (absent and null are): `because` says
        what else it would have the model compute. Numbers may differ in their last digits."""
        self._known.add(name)
        value = self.values.get(name)
        if value is None or any(_equal(value, one) for one in allowed):
            return
        wanted = " or ".join(json.dumps(one) for one in allowed) or "no such field"
        raise InputError(
            f'{self.where}: field "{name}" is {short(value)}, but {because}, which is not supported'
            f" here (expected {wanted}); use a model without it"
        )

    def wrong(self, name: str, expected: str) -> InputError:
        value = self.values.get(name, self.defaults.get(name))
        return InputError(
            f'{self.where}: field "{name}" is {short(value)}, expected {expected}; correct it'
        )

    def finish(self, harmless: Iterable[str], patterns: Iterable[str] = ()) -> None:
        """Refuses, by name, what was neither read nor is `harmless`; null says nothing."""
        known = self._known | set(harmless)
        strange = [
            name
            for name, value in self.values.items()
            if value is not None
            and name not in known
            and not any(re.fullmatch(pattern, name) for pattern in patterns)
        ]
        if strange:
            listed = ", ".join(f'"{name}" ({short(self.values[name], 40)})' for name in strange[:6])
            more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
            raise InputError(
                f"{self.where} has fields that are not known here and may change what the model"
                f" computes: {listed}{more}; remove a field from the file if it changes nothing"
            )


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:  # json's whole numbers have no largest
        return math.inf


def _equal(value: Any, wanted: Any) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, wanted))
    if numbers:
        return math.isclose(_as_float(value), wanted, rel_tol=1e-6)
    return type(value) is type(wanted) and value == wanted
