"""Damaged json files of every kind: bytes, values, structure. A function of the seed alone."""

import copy
import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**32 - 1, 2**63, 10**30, 1e308, -0.5),
    *("", "a", "\u0000", "é", "▁", "<s>", "x" * 10_000, "(((a*)*)*)*b", "[", "(?<=a+)b"),
    *([], [[]], {}, {"type": "ByteLevel"}, {"type": "Fixed"}, {"Fixed": 10**9}, [1, 2, 3]),
    *({"String": ""}, {"Regex": "(a|a)*$"}, {"Regex": "("}, {"type": "Sequence"}),
)


def damaged(text: str, seed: int) -> bytes:
    """A json file with one to three faults."""
    rng = random.Random(seed)
    if rng.random() < 0.35:
        return _bytes(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _value(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="replace")


def _bytes(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    kind = rng.randrange(5)
    at = rng.randrange(len(found))
    if kind == 0:
        return bytes(found[:at])
    if kind == 1:
        del found[at : at + rng.choice((1, 2, 100, 10_000))]
    elif kind == 2:
        for _ in range(rng.choice((1, 3, 30))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        found[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 50))))
    else:
        found[at:at] = found[at : at + rng.choice((10, 1000))]
    return bytes(found)


def _value(value: Any, rng: random.Random) -> Any:
    """One place of the tree, near its root more often than its thousands of words, is changed."""
    value = copy.deepcopy(value)
    if not (places := list(_places(value))):
        return rng.choice(STRANGE)
    shallow = [place for place in places if len(place[0]) <= 4 and "vocab" not in place[0]]
    _, holder, key = rng.choice(shallow if shallow and rng.random() < 0.8 else places)
    kind = rng.randrange(8)
    if kind >= 6:  # of the same type, so that more of them load
        holder[key] = _alike(holder[key], rng)
    elif kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1:
        _, other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-1, 10**6, 2**31, 2**32, 2**64, 0.1, 10**18))
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = rng.choice((holder[key][::-1], holder[key] * 1000, "", "\ud800"))
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _alike(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((0, 1, 2, 3, value + 1, value * 1000, 2**31, 2**32 - 1))
    if isinstance(value, str):
        return rng.choice((*(s for s in STRANGE if isinstance(s, str)), "Isolated", "always"))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[: len(value) // 2], value * 2, value * 50))
    return dict(reversed(value.items())) if isinstance(value, dict) else value


def _places(value: Any, path: tuple = ()) -> Any:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(items):
        yield (*path, key), value, key
        yield from _places(inner, (*path, key))
