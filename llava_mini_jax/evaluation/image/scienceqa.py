"""ScienceQA, test: school questions with two to five options; the paper's figure is of those with
an image.

    llava_test_CQM-A.json --.
    problems.json, pid_splits.json --by id--> Questions --> right letters, with an image and in all
    or ScienceQA-{FULL,IMG}/test-*.parquet ---'

The headline takes the letter that stands alone, of all questions with an image. LLaVA's scorer,
"official", sees from the recorded prompt whether there was an image, so a question without an
answer leaves its denominator; "missing" in the details says how many did, and the rule
"all_image_questions" keeps them in.

Parquet files have no ids: with pid_splits.json beside them, ScienceQA-FULL gets the ids in its
order; otherwise a question's id is its row ("row 17"), and only answers of our own can be joined.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter

_ASKED = "llava_test_CQM-A.json"
_FIELDS = {"question": str, "choices": list, "answer": int, "hint": str}
_KINDS = ("subject", "grade")
_LETTERS = "ABCDE"


def _questions(folder: Path) -> list[Question]:
    full, some = "ScienceQA-FULL/test-*.parquet", "ScienceQA-IMG/test-*.parquet"
    if parquet := layouts.parquet_instead(folder, _ASKED, full, some):
        return layouts.check_keys("scienceqa", _from_parquet(folder, parquet))
    path = BENCHMARK.need(folder, _ASKED)
    asked = layouts.read_list(path)
    problems_path = BENCHMARK.need(folder, "problems.json")
    problems = layouts.check_fields(layouts.read_json(problems_path), {}, str(problems_path))
    found = []
    for number, row in enumerate(asked, 1):
        layouts.check_fields(row, {"id": str, "conversations": list}, f"{path}, item {number}")
        name = row["id"]
        problem = layouts.check_fields(problems.get(name), _FIELDS, f"{problems_path}, {name}")
        human = layouts.check_fields(
            next(iter(row["conversations"]), None), {"value": str}, f"{path}, {name}, first turn"
        )
        text = human["value"].replace("<image>", "").strip() + layouts.LETTER
        image = None
        if "image" in row:
            layouts.check_fields(row, {"image": str}, f"{path}, {name}")
            image = folder / "images" / "test" / row["image"]
        found.append(_question(name, text, image, problem))
    known = {row["id"] for row in asked}
    odd = sorted(known ^ set(_listed(folder)))
    layouts.check_same("scienceqa", odd, f"{path} and the test split of pid_splits.json")
    return layouts.check_keys("scienceqa", found)


def _listed(folder: Path) -> list[str]:
    """The ids of the test split, in order."""
    path = BENCHMARK.need(folder, "pid_splits.json")
    splits = layouts.check_fields(layouts.read_json(path), {"test": list}, str(path))
    return [str(name) for name in splits["test"]]


def _from_parquet(folder: Path, files: Sequence[Path]) -> list[Question]:
    rows = layouts.read_parquet(files, _FIELDS, ("image", *_KINDS))
    names = [f"row {number}" for number in range(len(rows))]
    if (folder / "pid_splits.json").exists() and files[0].parent.name == "ScienceQA-FULL":
        names = _listed(folder)
        if len(names) != len(rows):
            raise InputError(
                f"scienceqa: pid_splits.json lists {len(names)} test questions, {files[0].parent}"
                f" has {len(rows)}; use files of the same version."
            )
    found = []
    for name, row in zip(names, rows, strict=True):
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        options = "".join(f"\n{chr(65 + i)}. {text}" for i, text in enumerate(row["choices"]))
        text = f"{context}{row['question']}{options}{layouts.LETTER}"
        found.append(_question(name, text, row["image"], row))
    return found


def _question(
    name: str, text: str, image: Path | bytes | None, problem: Mapping[str, Any]
) -> Question:
    right = problem["answer"]
    if not 0 <= right < len(problem["choices"]) <= len(_LETTERS):
        raise InputError(
            f"scienceqa: question {name} has {len(problem['choices'])} choices and the answer"
            f" {right}; expected 2 to {len(_LETTERS)}, and one of them."
        )
    return Question(
        key=name,
        question_id=name,
        text=text,
        prompt=text if image is None else f"<image>\n{text}",
        image=image,
        gold={
            "letter": _LETTERS[right],
            "choices": len(problem["choices"]),
            "hint": bool(problem["hint"]),
            **{kind: problem.get(kind) for kind in _KINDS},
        },
    )


def read_official(text: str) -> str:
    """A letter alone, or "X. " in front, or the one "The answer is X." in it; else FAILED."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)  # any character ends it, as in the script
    return said[0] if len(said) == 1 else "FAILED"


def read_lmms(text: str) -> str:
    """lmms-eval's: a letter alone in any case, or a capital in front of a period; else ""."""
    alone = text.strip().upper()  # blanks at the ends spoil the second form, not the first
    if len(alone) == 1:
        return alone
    return text[0] if text[1:2] == "." and text[0].isupper() else ""


def _rule(
    questions: Sequence[Question], right: Mapping[str, float], details: Mapping[str, Any]
) -> Rule:
    return Rule.mean_of({q.key: right[q.key] for q in questions}, details)


def _kinds(questions: Sequence[Question], right: Mapping[str, float]) -> dict[str, dict]:
    """Accuracy as ScienceQA's authors report it: by subject, by what is given, by grade."""

    def grade(gold: Mapping[str, Any]) -> int:
        return int(re.sub("[^0-9]", "", str(gold["grade"])) or 0)

    groups: dict[str, Callable[[Question], bool]] = {
        "NAT": lambda q: q.gold["subject"] == "natural science",
        "SOC": lambda q: q.gold["subject"] == "social science",
        "LAN": lambda q: q.gold["subject"] == "language science",
        "TXT": lambda q: q.gold["hint"],
        "IMG": lambda q: q.image is not None,
        "NO": lambda q: not q.gold["hint"] and q.image is None,
        "G1-6": lambda q: 1 <= grade(q.gold) <= 6,
        "G7-12": lambda q: 7 <= grade(q.gold) <= 12,
    }
    table = {}
    for name, belongs in groups.items():
        scores = [right[q.key] for q in questions if belongs(q)]
        table[name] = {"accuracy": 100 * sum(scores) / (len(scores) or 1), "n": len(scores)}
    return table


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("scienceqa", questions, answers)
    answered = [q for q in questions if q.key in answers]
    parsed = {
        q.key: lone_letter(answers[q.key].text, _LETTERS[: q.gold["choices"]]) for q in answered
    }
    official = {q.key: read_official(answers[q.key].text) for q in answered}
    lmms = {q.key: read_lmms(answers[q.key].text) for q in answered}

    def marks(said: Mapping[str, str]) -> dict[str, float]:
        return {q.key: float(said.get(q.key) == q.gold["letter"]) for q in questions}

    right, right_lmms = marks(official), marks(lmms)
    pictured = [q for q in questions if q.image is not None]
    recorded = [q for q in questions if q.key in answers and "<image>" in answers[q.key].prompt]
    missing = {"missing": len(questions) - len(parsed)}
    missing_pictured = {"missing": sum(q.key not in answers for q in pictured)}
    return Scores(
        headline="letter",
        rules={
            "letter": _rule(pictured, marks(parsed), missing_pictured),
            "official": _rule(recorded, right, missing_pictured),
            "all_image_questions": _rule(pictured, right, missing_pictured),
            "official_all": _rule(questions, right, missing | _kinds(questions, right)),
            "lmms_eval": _rule(pictured, right_lmms, missing_pictured),
            "lmms_eval_all": _rule(questions, right_lmms, missing),
        },
        parsed=parsed,
        unparsed=[key for key, letter in parsed.items() if not letter],
        readings={
            "letter": parsed,
            "official": {key: "" if x == "FAILED" else x for key, x in official.items()},
            "lmms_eval": lmms,
        },
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    folder="scienceqa",
    files={
        _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        "problems.json": "github.com/lupantech/ScienceQA, data/scienceqa",
        "pid_splits.json": "github.com/lupantech/ScienceQA, data/scienceqa",
        "images/test": "test.zip of ScienceQA (github.com/lupantech/ScienceQA)",
        "ScienceQA-{FULL,IMG}/test-*.parquet": "lmms-lab/ScienceQA on Hugging Face, instead",
    },
    metric="accuracy on questions with an image, %",
    paper={
        "LLaVA-1.5 7B": 66.8,
        "LLaVA-Mini 7B": 70.4,
        "LLaVA-Mini 7B HD": 69.7,
        "LLaVA-Mini 8B": 83.1,
    },
    max_new_tokens=1024,
    questions=_questions,
    score=_score,
)
