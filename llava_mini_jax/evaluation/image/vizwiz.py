"""VizWiz-VQA: questions and images of blind people, ten answers each, hidden for the test split.

    llava_test.jsonl, test/ --> Questions --> vizwiz_upload.json, all 8,000
    llava_val.jsonl, val.json, val/ --by image--> Questions --> accuracy
    or data/{test,val}-*.parquet

The server normalises the prediction and compares the humans' answers as they are stored; its table
of contractions has typographic apostrophes, so that "dont" becomes what nobody typed. LLaVA uploads
processed answers: that score is the paper's. lmms-eval processes both sides.

`vizwiz` is the test split where its file is there, else val; `vizwiz_val` is always val.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules import normalise

_INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_FIELDS = {"question_id": int, "image": str, "text": str}
_ANNOTATED = {"image": str, "question": str, "answers": list, "answerable": int}


def _questions(folder: Path, *, val: bool) -> list[Question]:
    if not val and (folder / "llava_test.jsonl").exists():
        rows = layouts.read_json_lines(folder / "llava_test.jsonl", _FIELDS)
        found = [_question(row, folder / "test" / row["image"], None) for row in rows]
    elif (folder / "val.json").exists() or (folder / "llava_val.jsonl").exists():
        found = _from_val(folder)
    else:
        splits = ["data/val-*.parquet"] if val else ["data/test-*.parquet", "data/val-*.parquet"]
        parquet = layouts.parquet_files(folder, *splits)
        if not parquet:
            BENCHMARK.need(folder, "val.json" if val else "llava_test.jsonl")
        found = _from_parquet(parquet)
    return layouts.check_keys("vizwiz", found)


def _from_val(folder: Path) -> list[Question]:
    path = BENCHMARK.need(folder, "val.json")
    golds = {}
    for number, row in enumerate(layouts.read_list(path)):
        layouts.check_fields(row, _ANNOTATED, f"{path}, item {number + 1}")
        for answer in row["answers"]:
            layouts.check_fields(answer, {"answer": str}, f"{path}, {row['image']}")
        humans = [answer["answer"] for answer in row["answers"]]
        if row["image"] in golds:
            raise InputError(f"{path} has {row['image']} twice; get the file again.")
        golds[row["image"]] = {
            "answers": humans,
            "answerable": row["answerable"],
            "answer_type": str(row.get("answer_type")),
            "text": _text(row["question"]),
        }
    if (folder / "llava_val.jsonl").exists():
        rows = layouts.read_json_lines(folder / "llava_val.jsonl", _FIELDS)
    else:
        rows = [
            {"question_id": number, "image": image, "text": gold["text"]}
            for number, (image, gold) in enumerate(golds.items())
        ]
    asked = {row["image"] for row in rows}
    files = f"{path} and llava_val.jsonl"
    layouts.check_same("vizwiz", sorted(asked ^ golds.keys()), files, "images")
    return [_question(row, folder / "val" / row["image"], golds[row["image"]]) for row in rows]


def _from_parquet(files: Sequence[Path]) -> list[Question]:
    columns = {"question_id": str, "question": str, "image": bytes}
    found = []
    for number, row in enumerate(layouts.read_parquet(files, columns, ("answers", "category"))):
        name = row["question_id"].removesuffix(".jpg") + ".jpg"
        gold = None
        if row["answers"]:
            answerable = int(row["category"] != "unanswerable")
            gold = {
                "answers": row["answers"],
                "answerable": answerable,
                "answer_type": row["category"],
            }
        # LLaVA numbers the questions in the order of the official files, which these have too.
        asked = {"question_id": number, "image": name, "text": _text(row["question"])}
        found.append(_question(asked, row["image"], gold))
    return found


def _text(question: str) -> str:
    """As LLaVA's files ask it: all small letters but the first."""
    return question.capitalize() + _INSUFFICIENT + layouts.SHORT


def _question(
    row: Mapping[str, Any], image: Path | bytes, gold: Mapping[str, Any] | None
) -> Question:
    return Question(
        key=row["image"],
        question_id=row["question_id"],
        text=row["text"],
        prompt=row["text"],
        image=image,
        gold=gold,
    )


def _rule(
    questions: Sequence[Question],
    said: Mapping[str, str],
    humans: Callable[[str], str] = lambda answer: answer,
) -> Rule:
    """Accuracy of normalised predictions; `humans` is applied to each human answer."""
    items = {}
    for question in questions:
        golds = [humans(answer) for answer in question.gold["answers"]]
        item = normalise.leave_one_out(said[question.key], golds) if question.key in said else 0.0
        items[question.key] = item

    def of(chosen: Callable[[Mapping[str, Any]], Any]) -> float:
        return _rounded([items[q.key] for q in questions if chosen(q.gold)])

    types = dict.fromkeys(q.gold["answer_type"] for q in questions)
    return Rule.mean_of(
        items,
        {
            "answerable": of(lambda gold: gold["answerable"]),
            "unanswerable": of(lambda gold: not gold["answerable"]),
            "answer types": {str(t): of(lambda gold, t=t: gold["answer_type"] == t) for t in types},
            "unanswerability": _unanswerability(questions, said),
            "missing": len(questions) - len(said),  # count as wrong
        },
    )


def _rounded(values: Sequence[float]) -> float:
    return round(100 * sum(values) / (len(values) or 1), 2)


def _unanswerability(questions: Sequence[Question], said: Mapping[str, str]) -> dict[str, float]:
    """Average precision and F1 of "unanswerable" as an answer, for want of a confidence."""
    pairs = [(not q.gold["answerable"], said.get(q.key) == "unanswerable") for q in questions]
    hits, claimed = pairs.count((True, True)), sum(said for _, said in pairs)
    are, n = sum(is_so for is_so, _ in pairs), len(pairs)
    if not are:
        return {"average_precision": 0.0, "f1_score": 0.0}
    recall = hits / are
    precision = hits / claimed if claimed else 0.0
    # Two thresholds: those claimed, then all, whose precision is the rate of unanswerable ones.
    average = recall * precision + (1 - recall) * are / n
    return {
        "average_precision": round(100 * average, 2),
        "f1_score": round(100 * 2 * hits / (claimed + are), 2),
    }


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("vizwiz", questions, answers)
    raw = layouts.texts(questions, answers)
    processed = {key: normalise.m4c(text) for key, text in raw.items()}
    unparsed = [key for key, text in processed.items() if not text]
    if any(q.gold is None for q in questions):
        return layouts.hidden("llava", processed, unparsed)

    def server(texts: Mapping[str, str], contractions: Mapping[str, str]) -> Rule:
        said = {key: normalise.vqa(text, contractions) for key, text in texts.items()}
        rule = _rule(questions, said)
        # The evaluation script rounds its figure to two decimals, lmms-eval does not.
        return dataclasses.replace(rule, value=_rounded(list(rule.items.values())))

    typographic, backtick = normalise.VIZWIZ_CONTRACTIONS, normalise.BACKTICK_CONTRACTIONS
    return Scores(
        headline="llava",
        rules={
            "llava": server(processed, typographic),
            "official": server(raw, typographic),
            "lmms_eval": _rule(questions, processed, normalise.m4c),
            "vlm_evaluation": server(raw, backtick),
            "vlm_evaluation_llava": server(processed, backtick),
        },
        parsed=processed,
        unparsed=unparsed,
    )


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """What EvalAI takes: all images of the split, answers processed as LLaVA does."""
    layouts.check_all_answered("vizwiz", questions, answers)
    upload = [{"image": q.key, "answer": normalise.m4c(answers[q.key].text)} for q in questions]
    return [layouts.write_json(out / "vizwiz_upload.json", upload)]


BENCHMARK = Benchmark(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    files={
        "llava_test.jsonl": "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        "test": "test.zip of vizwiz.org/tasks-and-datasets/vqa",
        "val.json": "Annotations.zip of vizwiz.org/tasks-and-datasets/vqa, to score val",
        "val": "val.zip of vizwiz.org/tasks-and-datasets/vqa, for val",
        "data/{test,val}-*.parquet": "lmms-lab/VizWiz-VQA on the Hugging Face hub, instead",
    },
    metric="VQA accuracy, %",
    paper={
        "LLaVA-1.5 7B": 50.0,
        "LLaVA-Mini 7B": 56.2,
        "LLaVA-Mini 7B HD": 58.5,
        "LLaVA-Mini 8B": 57.4,
    },
    max_new_tokens=128,
    questions=functools.partial(_questions, val=False),
    score=_score,
    submission=_submission,
)
_VAL_ONLY = dataclasses.replace(
    BENCHMARK,
    name="vizwiz_val",
    title="VizWiz val",
    paper={},
    questions=functools.partial(_questions, val=True),
)
BENCHMARKS = [BENCHMARK, _VAL_ONLY]
