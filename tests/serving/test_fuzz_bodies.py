"""The bodies that servers are fuzzed with: the same each time, and of all kinds."""

import json
from collections import Counter

from tests.serving.fuzz_bodies import bodies


def test_bodies_are_a_function_of_the_seed():
    assert list(bodies(300)) == list(bodies(300)) == list(bodies(400))[:300]
    assert list(bodies(100)) != list(bodies(100, seed=1))


def test_bodies_are_of_all_kinds():
    found: Counter[str] = Counter()
    for body in bodies(2000):
        assert len(body) < 4 * 2**20
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            found["not valid JSON"] += 1
            continue
        found[type(given).__name__] += 1
        if isinstance(given, dict):
            found.update(list(given))
            found["nan"] += b"NaN" in body
            found["special"] += b"<image>" in body
    assert found["dict"] > 1500 and found["not valid JSON"] > 50
    assert min(found[name] for name in ("stream", "n", "logprobs", "nan", "special", "tools")) > 5
