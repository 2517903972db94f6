"""EgoSchema: five options about three minutes of a first person's day.

    mc.json, or questions.json and subset_answers.json --> the public 500 --> accuracy
    questions.json                         (egoschema_full) --> all 5,031 --> submission.json

The paper's figure is of the public subset, whose answers are known: 256 of 500. The full set's are
not; `egoschema_full` asks all and writes what the validation server takes, and scores the subset.

The headline takes the letter that stands alone. "first_letter" is the release's, which reads an A
in "Answer: C"; "submission.json" has what it reads, as the release's has, and
"submission_letter.json" what the headline does.

A question whose video is missing gets no answer and is wrong, as in the accuracy that the release
prints, though its file has no row for it; "answered_only" leaves those out, by the release's rule.
lmms-eval draws an option at random where it reads none; here such an item counts a fifth, what that
gives on average.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_mini_jax.data.media.video_names import OFFICIAL_SUFFIXES, find_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules.letters import first_of
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter

_LETTERS = "ABCDE"
_FIELDS = {"q_uid": str, "question": str, **{f"option {i}": str for i in range(5)}}
_ROLE = (
    "You are a helpful expert in first person view video analysis. Please provide a single-letter"
    " answer (A, B, C, D, E) to the following multiple-choice question based on this video."
)


def _questions(full: bool, folder: Path) -> list[Question]:
    merged = folder / "mc.json"
    benchmark = FULL if full else BENCHMARK
    if merged.exists() and not (full and (folder / "questions.json").exists()):
        path = merged
        rows = _rows(path)
        known = {row["q_uid"]: row["answer"] for row in rows if "answer" in row}
    else:
        path = benchmark.need(folder, "questions.json")
        rows = _rows(path)
        subset = folder / "subset_answers.json"
        if subset.exists() or not full:
            subset = benchmark.need(folder, "subset_answers.json")
            known = layouts.check_fields(layouts.read_json(subset), {}, str(subset))
        else:
            known = {}
    there = {row["q_uid"] for row in rows}
    if strange := [uid for uid in known if uid not in there]:
        raise InputError(
            f"{benchmark.name}: {len(strange)} answers belong to no question in {path}:"
            f" {layouts.listed(strange)}. Use files of the same version."
        )
    found = [
        _question(folder, row, known, str(path)) for row in rows if full or row["q_uid"] in known
    ]
    return layouts.check_keys(benchmark.name, found)


def _rows(path: Path) -> list[Any]:
    rows = enumerate(layouts.read_list(path))
    return [layouts.check_fields(row, _FIELDS, f"{path}, question {i}") for i, row in rows]


def _question(
    folder: Path, row: Mapping[str, Any], known: Mapping[str, Any], place: str
) -> Question:
    uid = row["q_uid"]
    answer = known.get(uid)
    if uid in known and (type(answer) is not int or not 0 <= answer < 5):
        raise InputError(f"{place}: the answer to {uid} is {answer!r}; expected 0 to 4.")
    options = [row[f"option {i}"] for i in range(5)]
    choices = [f"{letter}: {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    text = "\n".join([_ROLE, row["question"], "Choices:", *choices, "", "Answer with one letter."])
    return Question(
        key=uid,
        question_id=uid,
        text=text,
        prompt=text,
        video=find_video([folder / "videos"], [uid], OFFICIAL_SUFFIXES),
        gold=None if uid not in known else {"answer": answer, "options": options},
    )


def read_release(text: str) -> int:
    """The first capital A to E anywhere, as 0 to 4; -1 for none."""
    return _LETTERS.find(first_of(text, _LETTERS) or "?")


def read_lmms(text: str, options: Sequence[str]) -> int | None:
    """lmms-eval's reading of five options, "A. ..": 0 to 4; None where it draws one at random.

    A letter in parentheses, before a blank or before a period; of several, the one whose last
    place is the first. Without any, an option's whole text in an answer of more than five words.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    forms = [(form.format(x), x) for form in ("({})", "{} ", "{}.") for x in _LETTERS]
    places = [(text.rfind(form), x) for form, x in forms if form in text]
    if not places and len(text.split()) > 5:
        lower = text.lower()
        whole = [(f"{x}. {o}".strip().lower(), x) for x, o in zip(_LETTERS, options, strict=True)]
        places = [(lower.rfind(option), x) for option, x in whole if option in lower]
    return _LETTERS.index(min(places, key=lambda p: p[0])[1]) if places else None


def _score(folder: Path, asked: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    texts = layouts.texts(asked, answers)
    parsed = {key: _LETTERS.find(lone_letter(text, _LETTERS) or "?") for key, text in texts.items()}
    release = {key: read_release(text) for key, text in texts.items()}
    known = [q for q in asked if q.gold is not None]

    def marks(said: Mapping[str, int]) -> dict[str, float]:
        return {q.key: float(said.get(q.key) == q.gold["answer"]) for q in known}

    items = marks(release)
    details = {
        "missing": sum(q.key not in parsed for q in known),
        "hidden": len(asked) - len(known),
    }
    lmms, drawn, lmms_said = {}, 0, dict.fromkeys(texts, -1)
    for question in known:
        lmms[question.key] = 0.0
        if question.key in answers:
            read = read_lmms(answers[question.key].text, question.gold["options"])
            lmms[question.key] = 0.2 if read is None else float(read == question.gold["answer"])
            lmms_said[question.key] = -1 if read is None else read
            drawn += read is None
    said = {"letter": parsed, "first_letter": release}
    if len(known) == len(asked):  # what lmms-eval reads depends on the options, which gold has
        said["lmms_eval"] = lmms_said
    return Scores(
        headline="letter",
        rules={
            "letter": Rule.mean_of(marks(parsed), details),
            "first_letter": Rule.mean_of(items, details),
            "answered_only": Rule.mean_of({k: v for k, v in items.items() if k in texts}, details),
            "lmms_eval": Rule.mean_of(lmms, {**details, "drawn_at_random": drawn}),
        },
        parsed=parsed,
        unparsed=[key for key, number in parsed.items() if number < 0],
        readings={
            rule: {key: "" if n < 0 else _LETTERS[n] for key, n in own.items()}
            for rule, own in said.items()
        },
    )


def _submission(
    folder: Path, asked: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """uid -> 0 to 4, by the release's rule and by the headline's.

    The server takes no -1; without a letter it is 0, the A of other scripts.
    """
    layouts.check_all_answered("egoschema", asked, answers)
    release = {q.key: max(read_release(answers[q.key].text), 0) for q in asked}
    letters = {q.key: lone_letter(answers[q.key].text, _LETTERS) or "A" for q in asked}
    return [
        layouts.write_json(out / "submission.json", release),
        layouts.write_json(
            out / "submission_letter.json", {key: _LETTERS.index(x) for key, x in letters.items()}
        ),
    ]


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the release, {"q_uid", "output"}, as lines of an answers file."""
    return [
        {"question_id": row["q_uid"], "text": row["output"]}
        if {"q_uid", "output"} <= row.keys()
        else dict(row)
        for row in rows
    ]


_SOURCE = "github.com/egoschema/EgoSchema"
BENCHMARK = Benchmark(
    name="egoschema",
    title="EgoSchema subset",
    folder="egoschema",
    files={
        "questions.json": _SOURCE,
        "subset_answers.json": _SOURCE,
        "videos": f"{_SOURCE} (download.py)",
        "mc.json": "questions.json with each one's answer added, as the release wants it, instead",
    },
    metric="accuracy on the public 500, %",
    paper={"LLaVA-Mini 7B": 51.2},
    max_new_tokens=128,
    questions=partial(_questions, False),
    score=_score,
    submission=_submission,
    from_rows=_from_rows,
)
FULL = dataclasses.replace(
    BENCHMARK,
    name="egoschema_full",
    title="EgoSchema",
    metric="accuracy on those with known answers, %",
    paper={},
    questions=partial(_questions, True),
)
BENCHMARKS = [BENCHMARK, FULL]
