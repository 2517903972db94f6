"""The golden sets of the image benchmarks: folders in both layouts, answers, expectations."""

import json
import shutil

from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.run import answers
from tests import golden_data

GOLDEN = golden_data.folder("eval")
LAYOUTS = ("llava", "parquet")
CLOSE = dict(rel=0, abs=1e-6)  # what the project promises of every figure


def expected(name):
    return json.loads((GOLDEN / name / "expected.json").read_text(encoding="utf-8"))


def answer_lines(name):
    return answers.read_lines(next((GOLDEN / name / "answers").rglob("*.jsonl")))


def read_lines(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def folder(name, layout, tmp_path, *beside):
    """A copy of the set as a user would have it; `beside`: files to put next to parquet files."""
    target = tmp_path / name
    if layout == "llava":
        shutil.copytree(GOLDEN / name, target, ignore=shutil.ignore_patterns("hf_parquet"))
    else:
        shutil.copytree(GOLDEN / name / "hf_parquet", target / "snapshot")
        for file in beside:
            shutil.copy(GOLDEN / name / file, target)
    return target


def joined(name, place, lines=None):
    """The benchmark, its questions, and the golden answers (or `lines`) joined with them."""
    found = benchmark.find(name)
    questions = found.questions(place)
    given = answer_lines(name) if lines is None else lines
    return found, questions, answers.join(found, questions, given)


def scored(name, place, lines=None):
    found, questions, given = joined(name, place, lines)
    return questions, found.score(place, questions, given.answers)


def rewrite_lines(path, change):
    """Each row of a file of JSON lines goes through `change`; None removes it."""
    kept = [row for row in map(change, read_lines(path)) if row is not None]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def rewrite_parquet(path, change):
    import pyarrow.parquet as parquet

    parquet.write_table(change(parquet.read_table(path)), path)
