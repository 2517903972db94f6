"""Benchmarks of several tasks, each a file of multiple-choice questions about videos.

    json/TASK.json  [{"video", "question", "candidates", "answer"}, ..]  --questions--> Questions
    their answers   --scores--> the mean over the tasks of each one's accuracy, by several rules

The headline takes the letter that stands alone, and none is wrong. Beside it: "first_letter", the
first one anywhere that is an option's (the A of "Answer"), and the release's own rules: in
"release_first_letter" no letter is an A; "release_option" wants the letter before the first ")", or
alone. A video that the release cannot read is answered "N/A", which its first letter makes an A; in
the others that is no letter.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data.media.video_names import OFFICIAL_SUFFIXES, find_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules.letters import before_parenthesis, first_of
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter

_UNREAD = "N/A"
_INSTRUCTION = "\nAnswer with one letter."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    name: str  # begins the keys of its questions
    title: str  # as the paper has it
    file: str  # of its questions, below the benchmark's folder
    videos: str  # the folder of its videos, likewise


def _video(folder: Path, name: str) -> Path:
    """The file (or folder of frames) of this name, or with another suffix; else as it is named."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in OFFICIAL_SUFFIXES:
        stem, suffix = name, ""
    return find_video([folder], [stem], (suffix, *OFFICIAL_SUFFIXES))


def questions(benchmark: Benchmark, folder: Path, tasks: Sequence[Task]) -> list[Question]:
    """The tasks' questions in order; their ids count through all of them, as in joined answers."""
    found: list[Question] = []
    for task in tasks:
        path = benchmark.need(folder, task.file)
        rows = layouts.read_json(path)
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{path} holds no list of questions; get it again.")
        for number, row in enumerate(rows):
            place = f"{path}, question {number}"
            layouts.check_fields(row, {"video": str, "question": str, "candidates": list}, place)
            text, gold = _posed(row, place)
            found.append(
                Question(
                    key=f"{task.name}/{number}",
                    question_id=len(found),
                    text=text + _INSTRUCTION,
                    prompt=text + _INSTRUCTION,
                    video=_video(folder / task.videos, row["video"]),
                    gold={"task": task.title, **gold},
                )
            )
    return found


def _posed(row: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """The question with its options as the release writes them, and what is right."""
    candidates, answer = [str(c) for c in row["candidates"]], str(row.get("answer"))
    if answer not in candidates:
        raise InputError(
            f"{place}: the answer {answer!r} is none of the candidates"
            f" {layouts.listed(candidates)}; correct it or get the file again."
        )
    options = [f"({chr(65 + i)}) {option}" for i, option in enumerate(candidates)]
    text = "\n".join([f"Question: {row['question']}", "Options:", *options]).rstrip()
    # Of equal candidates the release takes the last one to be right, lmms-eval the first.
    last = len(candidates) - 1 - candidates[::-1].index(answer)
    return text, {
        "letter": chr(65 + last),
        "first_letter": chr(65 + candidates.index(answer)),
        "answer": answer,
        "options": len(candidates),
    }


def right(
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    is_right: Callable[[Mapping[str, Any], str], bool],
) -> dict[str, float]:
    """1 for each question that `is_right` says so of, given its gold and answer; missing are 0."""
    return {
        q.key: float(q.key in answers and is_right(q.gold, answers[q.key].text)) for q in questions
    }


def task_rule(
    questions: Sequence[Question],
    items: Mapping[str, float],
    details: Mapping[str, Any],
    *,
    left_out: Collection[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Rule:
    """The mean of the tasks' accuracies, in percent; these, and means of groups of them, as parts.

    Questions `left_out` are in no denominator; a task that has no other ones has accuracy 0.
    """
    tasks, sizes = {}, set()
    for title in dict.fromkeys(q.gold["task"] for q in questions):
        own = [q.key for q in questions if q.gold["task"] == title and q.key not in left_out]
        tasks[title] = 100 * _mean([items[key] for key in own])
        sizes.add(len(own))
    counted = [items[q.key] for q in questions if q.key not in left_out]
    means = {}
    for group, members in (groups or {}).items():
        if there := [tasks[title] for title in members if title in tasks]:
            means[group] = _mean(there)
    return Rule(
        value=_mean(list(tasks.values())),
        items=items,
        # Tasks of one size: the mean of their means is that of all items.
        scale=100 if len(sizes) == 1 and not left_out else None,
        details={**details, "over_all_questions": 100 * _mean(counted), "parts": means | tasks},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def scores(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    lmms_reads: Callable[[str], str],
    **others: Rule,
) -> Scores:
    """The headline, the release's two rules, and `others`; `lmms_reads` is lmms-eval's reader."""
    layouts.check_prompts(benchmark.name, questions, answers)
    readers: dict[str, Callable[[str, str], str]] = {
        "letter": lone_letter,
        "first_letter": lambda text, own: "" if text.strip() == _UNREAD else first_of(text, own),
        "release_first_letter": lambda text, own: first_of(text, own) or "A",
        "release_option": lambda text, own: before_parenthesis(text),
    }
    answered = [q for q in questions if q.key in answers]
    said = {
        rule: {q.key: read(answers[q.key].text, _letters(q.gold)) for q in answered}
        for rule, read in {**readers, "lmms_eval": lambda text, own: lmms_reads(text)}.items()
    }
    details = {
        "missing": len(questions) - len(answered),
        "unread_videos": sum(answers[q.key].text.strip() == _UNREAD for q in answered),
    }
    rules = {
        rule: {q.key: float(said[rule].get(q.key) == q.gold["letter"]) for q in questions}
        for rule in readers
    }
    letters = {q.key: _letters(q.gold) for q in answered}
    return Scores(
        headline="letter",
        rules={
            name: task_rule(questions, items, details, groups=groups)
            for name, items in rules.items()
        }
        | others,
        parsed=said["letter"],
        unparsed=[key for key, letter in said["letter"].items() if not letter],
        readings={
            rule: {key: x if x in tuple(letters[key]) else "" for key, x in own.items()}
            for rule, own in said.items()
        },
    )


def _letters(gold: Mapping[str, Any]) -> str:
    return "".join(chr(65 + i) for i in range(gold["options"]))


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the release, {"index", "pred", ...}, as lines of an answers file.

    Rows without an "index" are counted: they stand in the order of the questions.
    """
    return [
        {
            "question_id": row.get("index", number),
            "prompt": row.get("question", ""),
            "text": row["pred"],
        }
        if "pred" in row and "text" not in row
        else dict(row)
        for number, row in enumerate(rows)
    ]
