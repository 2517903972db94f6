"""Bodies of requests to JSON, and what is said of those that are wrong.

    bytes --parse--> JSON object          ApiError 400 where it is none
    pydantic's errors --told--> one message: at most 10 errors, each value cut

Values are a stranger's: rendering a huge one would be an attack of its own.
"""

import json
import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn

from llava_mini_jax.serving.errors import ApiError

MOST_ERRORS, LONGEST_VALUE = 10, 200


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; ApiError where it is none."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise ApiError(
            400, "the body is nested too deeply; send only the documented fields"
        ) from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8; send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON ({error.msg}, {place})") from None
    except ValueError:  # an integer of thousands of digits
        raise ApiError(400, "the body has a number that is too long; send a shorter one") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {shown(found)}; send a JSON object with the fields")
    return found


def _no_number(name: str) -> NoReturn:
    # Python's parser takes it; in sampling it would reach the device.
    raise ApiError(400, f"the body has {name}, which is not valid JSON; send a finite number")


def told(problems: Sequence[Any]) -> str:
    """pydantic's errors in one message."""
    said = [_told(problem) for problem in problems[:MOST_ERRORS]]
    more = len(problems) - len(said)
    return "; ".join(said) + f"; and {more} more errors" * bool(more)


def _told(problem: Any) -> str:
    place, said = _place(problem["loc"]), problem["msg"]
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{place} is not supported; leave it out"
    return f"{place} is {shown(problem['input'])}: {said[0].lower()}{said[1:]}"


def _place(location: tuple[int | str, ...]) -> str:
    """messages[0].content, of names that a client may have chosen."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step[:50]}"
    return path.removeprefix(".")[:LONGEST_VALUE]


def shown(value: Any) -> str:
    """A client's value for a message: cut, and containers by their size alone."""
    if isinstance(value, dict):
        return f"an object with {len(value)} field{'s' * (len(value) != 1)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return json.dumps(value[:LONGEST_VALUE]) + "..." * (len(value) > LONGEST_VALUE)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    short = reprlib.Repr()
    short.maxlong = 40
    return short.repr(value)[:LONGEST_VALUE]
