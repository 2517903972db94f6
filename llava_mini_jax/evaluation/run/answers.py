"""Answers files: LLaVA's JSON lines, ours and anybody's, joined with the questions they answer.

{"question_id": 7, "prompt": "..", "text": "cat", "answer_id": "x", "model_id": "m", "metadata": {}}

Ours say more in "metadata": {"key": ..., "cut": false}; LLaVA's own scripts read over it. Lines
that belong to no question, second answers to one question and missing answers are reported by id;
none of them makes a denominator smaller.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """Which answer belongs to which question, and what does not fit."""

    answers: Mapping[str, Output]  # by key, in the order of the questions
    missing: Sequence[str]  # keys of questions without an answer
    unknown: Sequence[str]  # ids of lines that belong to no question
    repeated: Sequence[str]  # keys that have a second, other answer; the first one counts


def line_of(question: Question, text: str, *, answer_id: str, model_id: str, cut: bool) -> dict:
    """A line of an answers file, as LLaVA's scripts write and read it."""
    return {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": answer_id,
        "model_id": model_id,
        "metadata": {"key": question.key, "cut": cut},
        **question.record,
    }


def files(folder: Path) -> list[Path]:
    """The answers files of a folder: one, or those of its shards in their order."""
    return sorted(folder.glob("answers*.jsonl"), key=lambda path: (len(path.name), path.name))


def read_lines(path: Path | str, benchmark: Benchmark | None = None) -> list[dict[str, Any]]:
    """The lines of an answers file; of a `benchmark`, also in the release's own form.

    Raises InputError with the line's number for one that is none.
    """
    rows = layouts.read_json_lines(Path(path), {})
    from_rows = None if benchmark is None else benchmark.from_rows
    lines = rows if from_rows is None else from_rows(rows)
    for number, line in enumerate(lines, 1):
        layouts.check_fields(line, {"text": str}, f"{path}, line {number}")
    return lines


def join(
    benchmark: Benchmark, questions: Sequence[Question], lines: Sequence[Mapping[str, Any]]
) -> Joined:
    """The answers of the questions: by our own key where a line has one, else by `key_of`."""
    known = {question.key: question for question in questions}
    if len(known) < len(questions):
        seen: set[str] = set()
        twice = next(q.key for q in questions if q.key in seen or seen.add(q.key))
        raise InputError(f"{benchmark.name}: two questions have the key {twice}; correct the data.")
    by_id = {str(question.question_id): question.key for question in questions}
    found: dict[str, Output] = {}
    unknown, repeated = [], []
    for line in lines:
        metadata = line.get("metadata")
        key = metadata.get("key") if isinstance(metadata, Mapping) else None
        if key is None and benchmark.key_of is not None:
            key = benchmark.key_of(line)
        elif key is None:
            key = by_id.get(str(line.get("question_id")))
        if key not in known:
            unknown.append(str(line.get("question_id", key)))
            continue
        cut = metadata.get("cut") if isinstance(metadata, Mapping) else None
        answer = Output(text=line["text"], prompt=str(line.get("prompt", "")), cut=cut, line=line)
        if key in found and found[key].text != answer.text:
            repeated.append(key)
        found.setdefault(key, answer)
    return Joined(
        answers={q.key: found[q.key] for q in questions if q.key in found},
        missing=[q.key for q in questions if q.key not in found],
        unknown=unknown,
        repeated=repeated,
    )
