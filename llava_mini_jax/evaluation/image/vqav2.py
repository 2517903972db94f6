"""VQAv2: open questions about COCO images, ten humans' answers each, hidden for the test splits.

    llava_vqav2_mscoco_test-dev2015.jsonl --> Questions --> vqav2_upload.json, all of test2015
    llava_vqav2_mscoco_val2014.jsonl, or v2_OpenEnded_mscoco_val2014_questions.json --.
    v2_mscoco_val2014_annotations.json ----------------------------by id--> Questions --> accuracy
    or data/{testdev,validation}-*.parquet

One file of predictions has three legitimate scores: the official rule on the answers as they are
(no normalisation where all humans agree), the same after LLaVA's processing, which is what its
uploads and so the paper's figures are, and lmms-eval's, which always normalises.

`vqav2` is test-dev where its file is there, else val; `vqav2_val` is always val.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules import normalise

_TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
_TEST = "llava_vqav2_mscoco_test2015.jsonl"
_VAL = "llava_vqav2_mscoco_val2014.jsonl"
_VAL_OFFICIAL = "v2_OpenEnded_mscoco_val2014_questions.json"
_GOLD = "v2_mscoco_val2014_annotations.json"
_FIELDS = {"question_id": int, "image": str, "text": str}
_ANNOTATED = {"answers": list, "question_type": str, "answer_type": str}


def _questions(folder: Path, *, val: bool) -> list[Question]:
    if not val and (folder / _TEST_DEV).exists():
        rows = layouts.read_json_lines(folder / _TEST_DEV, _FIELDS)
        found = [_question(row, folder / "test2015" / row["image"], None) for row in rows]
    elif (folder / _VAL).exists() or (folder / _VAL_OFFICIAL).exists():
        found = _from_val(folder)
    else:
        splits = ["data/validation-*.parquet"]
        if not val:
            splits.insert(0, "data/testdev-*.parquet")
        parquet = layouts.parquet_files(folder, *splits)
        if not parquet:
            BENCHMARK.need(folder, _VAL if val else _TEST_DEV)
        found = _from_parquet(parquet)
    return layouts.check_keys("vqav2", found)


def _from_val(folder: Path) -> list[Question]:
    if (folder / _VAL).exists():
        rows = layouts.read_json_lines(folder / _VAL, _FIELDS)
    else:
        path = folder / _VAL_OFFICIAL
        listed = layouts.check_fields(layouts.read_json(path), {"questions": list}, str(path))
        rows = []
        for row in listed["questions"]:
            fields = {"question_id": int, "image_id": int, "question": str}
            layouts.check_fields(row, fields, f"{path}, question {len(rows) + 1}")
            image = f"COCO_val2014_{row['image_id']:012d}.jpg"
            rows.append({**row, "image": image, "text": row["question"] + layouts.SHORT})
    path = BENCHMARK.need(folder, _GOLD)
    golds = {}
    listed = layouts.check_fields(layouts.read_json(path), {"annotations": list}, str(path))
    for number, gold in enumerate(listed["annotations"], 1):
        fields = {"question_id": int, **_ANNOTATED}
        layouts.check_fields(gold, fields, f"{path}, annotation {number}")
        golds[gold["question_id"]] = gold
    asked = {row["question_id"] for row in rows}
    odd = [str(name) for name in sorted(asked ^ golds.keys())]
    layouts.check_same("vqav2", odd, f"{path} and its file of questions")
    pictures = folder / "val2014"
    return [_question(row, pictures / row["image"], golds[row["question_id"]]) for row in rows]


def _from_parquet(files: Sequence[Path]) -> list[Question]:
    columns = {"question_id": int, "question": str, "image": bytes}
    found = []
    for row in layouts.read_parquet(files, columns, tuple(_ANNOTATED)):
        place = f"{files[0].parent}, question {row['question_id']}"
        annotated = bool(row["answers"])
        if annotated:
            layouts.check_fields(row, _ANNOTATED, place)
        text = row["question"] + layouts.SHORT
        found.append(_question({**row, "text": text}, row["image"], row if annotated else None))
    return found


def _question(
    row: Mapping[str, Any], image: Path | bytes, annotated: Mapping[str, Any] | None
) -> Question:
    gold = None
    if annotated is not None:
        place = f"vqav2, question {row['question_id']}"
        for answer in annotated["answers"]:
            layouts.check_fields(answer, {"answer": str}, place)
        answers = [answer["answer"] for answer in annotated["answers"]]
        gold = {**{name: annotated[name] for name in _ANNOTATED}, "answers": answers}
    return Question(
        key=str(row["question_id"]),
        question_id=row["question_id"],
        text=row["text"],
        prompt=row["text"],
        image=image,
        gold=gold,
    )


def official(text: str, humans: Sequence[str]) -> float:
    """One question's accuracy on the VQA server: no normalisation where the humans agree."""
    text, humans = normalise.flat(text), [normalise.flat(answer) for answer in humans]
    if len(set(humans)) > 1:
        text = normalise.marks_and_words(text)
        humans = [normalise.marks_and_words(answer) for answer in humans]
    return normalise.leave_one_out(text, humans)


def always_normalised(text: str, humans: Sequence[str]) -> float:
    """One question's accuracy in lmms-eval."""
    return normalise.leave_one_out(normalise.vqa(text), [normalise.vqa(h) for h in humans])


def _official_rule(questions: Sequence[Question], said: Mapping[str, str]) -> Rule:
    items = {
        q.key: official(said[q.key], q.gold["answers"]) if q.key in said else 0.0 for q in questions
    }

    def table(field: str) -> dict[str, float]:
        kinds = dict.fromkeys(q.gold[field] for q in questions)
        return {
            kind: normalise.percent([items[q.key] for q in questions if q.gold[field] == kind])
            for kind in kinds
        }

    return Rule(
        value=normalise.percent(list(items.values())),
        # The script rounds what it says of each question, and averages what it did not round.
        items={key: normalise.percent([item]) / 100 for key, item in items.items()},
        scale=100,
        details={
            "perAnswerType": table("answer_type"),
            "perQuestionType": table("question_type"),
            "split": "val",  # the only one with answers
            "missing": len(questions) - len(said),  # count as wrong
        },
    )


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("vqav2", questions, answers)
    raw = layouts.texts(questions, answers)
    processed = {key: normalise.m4c(text) for key, text in raw.items()}
    unparsed = [key for key, text in processed.items() if not text]
    if any(q.gold is None for q in questions):
        return layouts.hidden("llava", processed, unparsed)
    common = {
        q.key: always_normalised(raw[q.key], q.gold["answers"]) if q.key in raw else 0.0
        for q in questions
    }
    return Scores(
        headline="llava",
        rules={
            "llava": _official_rule(questions, processed),
            "official": _official_rule(questions, raw),
            "lmms_eval": Rule.mean_of(common, {"missing": len(questions) - len(raw)}),
        },
        parsed=processed,
        unparsed=unparsed,
    )


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """What EvalAI takes: all questions of test2015, "" for those that were not asked."""
    layouts.check_all_answered("vqav2", questions, answers)
    if parquet := layouts.parquet_instead(folder, _TEST, "data/test-*.parquet"):
        rows = layouts.read_parquet(parquet, {"question_id": int})
    else:
        rows = layouts.read_json_lines(BENCHMARK.need(folder, _TEST), {"question_id": int})
    listed = [row["question_id"] for row in rows]
    known = set(listed)
    unknown = [q.key for q in questions if q.question_id not in known]
    if unknown or len(known) < len(listed):
        what = f"does not list {layouts.listed(unknown)}" if unknown else "lists questions twice"
        raise InputError(f"vqav2: the list of test2015 in {folder} {what}; get it again.")
    upload = [
        {
            "question_id": name,
            "answer": normalise.m4c(answers[str(name)].text) if str(name) in answers else "",
        }
        for name in listed
    ]
    return [layouts.write_json(out / "vqav2_upload.json", upload)]


_FILES = {
    _TEST_DEV: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
    _TEST: "LLaVA's eval.zip; only submissions need it",
    "test2015": "COCO's test2015.zip (cocodataset.org)",
    _VAL: "the next file; only where it was made with LLaVA's tools",
    _VAL_OFFICIAL: "visualqa.org/download.html, to score val",
    _GOLD: "visualqa.org/download.html, to score val",
    "val2014": "COCO's val2014.zip (cocodataset.org), for val",
    "data/{testdev,validation}-*.parquet": "lmms-lab/VQAv2 on the Hugging Face hub, instead",
}


_PAPER = {  # of test-dev
    "LLaVA-1.5 7B": 78.5,
    "LLaVA-Mini 7B": 77.6,
    "LLaVA-Mini 7B HD": 78.9,
    "LLaVA-Mini 8B": 79.0,
}
BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    files=_FILES,
    metric="VQA accuracy, %",
    paper=_PAPER,
    max_new_tokens=128,
    questions=functools.partial(_questions, val=False),
    score=_score,
    submission=_submission,
)
_VAL_ONLY = dataclasses.replace(
    BENCHMARK,
    name="vqav2_val",
    title="VQAv2 val",
    paper={},
    questions=functools.partial(_questions, val=True),
)
BENCHMARKS = [BENCHMARK, _VAL_ONLY]
