"""What video benchmarks read from a judge's reply, a Python dictionary: {'pred': 'yes', 'score': 4}

    reply --read_literal---> what the official scripts keep in their result files
          --read_official--> YesNoScore: right or not, score; as these scripts count it
          --read_tolerant--> the same, also from a dictionary among other words

Official: a reply must be a bare literal, or the judge is asked again; a score is cut to a whole
number (4.8 is 4) and "4.5" in quotes is none, worth 0; "yes" anywhere in pred is right, else "no"
anywhere (as in "unknown") is wrong, else the verdict counts in neither. An item whose score cannot
be read has lost its yes or no as well.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.judge.judging import Reply

_UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_UNCOUNTED = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)
_DICTIONARY = re.compile(r"\{[^{}]*\}")
_SCORE = re.compile(r"(?i)score\W{0,6}(\d+(?:\.\d+)?)")
_WORST, _BEST = 0, 5


def read_literal(reply: str) -> Any:
    """A reply as the scripts' result files hold it; raises ValueError where they ask again."""
    try:
        # Through JSON, as their files are: tuples become lists, numbers as keys texts.
        return json.loads(json.dumps(ast.literal_eval(reply)))
    except _UNREADABLE as error:
        raise ValueError("no Python literal") from error


def is_literal(reply: str) -> bool:
    with suppress(ValueError):
        read_literal(reply)
        return True
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class YesNoScore:
    """Of one item. None: not to be read from it."""

    right: bool | None = None
    score: float | None = None


def read_official(reply: str) -> YesNoScore | None:
    """None if the scripts would ask again, and after their last round leave the item out."""
    try:
        found = read_literal(reply)
    except ValueError:
        return None
    score, right = None, None
    with suppress(*_UNCOUNTED):  # in this order: without a score its yes or no is not looked at
        score = int(found["score"])
        pred = found["pred"].lower()
        right = True if "yes" in pred else False if "no" in pred else None
    return YesNoScore(right=right, score=score)


def read_tolerant(replies: Sequence[Reply]) -> YesNoScore:
    """Of the first reply that says something about an item; scores keep their fraction."""
    for reply in replies:
        verdict = _tolerant(reply.text)
        if verdict.right is not None or verdict.score is not None:
            return verdict
    return YesNoScore()


def _tolerant(text: str) -> YesNoScore:
    found = next(filter(None, map(_dictionary, _DICTIONARY.findall(text))), None)
    if found is None:
        number = _SCORE.search(text)
        return YesNoScore(right=_yes(text), score=_in_range(number[1]) if number else None)
    return YesNoScore(right=_yes(found.get("pred")), score=_in_range(found.get("score")))


def _dictionary(text: str) -> dict[Any, Any] | None:
    text = text.replace("''", "'")  # as in one of the official examples
    for read in (ast.literal_eval, json.loads):
        with suppress(*_UNREADABLE):
            if isinstance(found := read(text), dict):
                return found
    return None


def _yes(pred: Any) -> bool | None:
    if isinstance(pred, bool):
        return pred
    words = set(re.findall(r"[a-z]+", pred.lower())) if isinstance(pred, str) else set()
    said = words & {"yes", "no"}
    return None if len(said) != 1 else said == {"yes"}


def _in_range(score: Any) -> float | None:
    if isinstance(score, bool):
        return None
    with suppress(TypeError, ValueError, OverflowError):
        return number if _WORST <= (number := float(score)) <= _BEST else None
    return None


def mean_score(verdicts: Sequence[YesNoScore]) -> float:
    """Of all verdicts, those without a score too, which count as 0; NaN of none."""
    return sum(v.score or 0 for v in verdicts) / len(verdicts) if verdicts else math.nan


def write_result(path: Path, rows: Mapping[str, tuple[str | None, Mapping[str, str]]]) -> Path:
    """The scripts' combined result, {key: [what the judge said, what it was asked]}.

    Items without a readable reply are not in it, as in theirs.
    """
    found = {
        key: [read_literal(reply), dict(asked)]
        for key, (reply, asked) in rows.items()
        if reply is not None and is_literal(reply)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
