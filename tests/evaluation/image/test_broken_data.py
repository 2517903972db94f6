"""Data files broken at random: an InputError, or all items are still counted; nothing else."""

import json
import random

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.run import answers
from tests.evaluation.image import golden_sets as golden

NAMES = ("pope", "gqa", "vqav2", "vizwiz", "textvqa", "scienceqa", "mme")
JUNK = [None, 1, -3, 2.5, "", "x", [], {}, ["a"], {"a": 1}, True]
TIMES = 60


def break_once(value, rng, depth=0):
    """The same value with one thing in it removed, doubled, or of another type."""
    if isinstance(value, dict | list) and value and (depth == 0 or rng.random() < 0.7):
        place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        what = rng.choice(["remove", "double", "junk", "deeper", "deeper"])
        if what == "remove":
            del value[place]
        elif what == "double" and isinstance(value, list):
            value.append(value[place])
        elif what == "junk":
            value[place] = rng.choice(JUNK)
        else:
            value[place] = break_once(value[place], rng, depth + 1)
        return value
    return rng.choice(JUNK)


def break_file(path, rng):
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(json.dumps(break_once(json.loads(text), rng)))
    except ValueError:  # JSON lines
        rows = break_once([json.loads(line) for line in text.splitlines()], rng)
        path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", NAMES)
def test_broken_data(name, tmp_path):
    place = golden.folder(name, "llava", tmp_path)
    found, lines = benchmark.find(name), golden.answer_lines(name)
    _, whole = golden.scored(name, place)
    counted = whole.rules[whole.headline].items.keys()
    expectations = golden.GOLDEN.rglob("expected*.json")
    known = {path.name for path in expectations}
    files = [p for p in sorted(place.rglob("*.json*")) if p.name not in known]
    files = [p for p in files if "answers" not in p.parts]
    rng, refused = random.Random(name), 0
    for _ in range(TIMES):
        path = rng.choice(files)
        before = path.read_bytes()
        break_file(path, rng)
        try:
            questions = found.questions(place)
            given = answers.join(found, questions, lines)
            scores = found.score(place, questions, given.answers)
            assert len(scores.rules[scores.headline].items) == len(counted)
        except InputError:
            refused += 1
        path.write_bytes(before)
    assert refused >= TIMES / 10  # files of which little is read bear most of it
