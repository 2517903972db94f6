"""GQA, testdev_balanced: short answers, right if they equal the annotated one.

    llava_gqa_testdev_balanced.jsonl -----------.
    data/testdev_balanced_questions.json --by id--> Questions --> exact match, of balanced ones
    or testdev_balanced_{instructions,images}/ -'       '--> testdev_balanced_predictions.json

LLaVA takes periods from the end of an answer and lower-cases it, nothing else; so do our files.
Questions that are not balanced are asked where LLaVA's file has them, and never counted.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores, percent

_ASKED = "llava_gqa_testdev_balanced.jsonl"
_GOLD = "data/testdev_balanced_questions.json"
_FIELDS = {"question": str, "answer": str, "isBalanced": bool, "types": dict, "groups": dict}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _questions(folder: Path) -> list[Question]:
    pattern = "testdev_balanced_instructions/testdev-*.parquet"
    if parquet := layouts.parquet_instead(folder, _ASKED, pattern):
        return layouts.check_keys("gqa", _from_parquet(folder, parquet))
    asked = layouts.read_json_lines(
        BENCHMARK.need(folder, _ASKED), {"question_id": str, "image": str, "text": str}
    )
    # Or in the folder itself.
    path = next((p for p in (folder / _GOLD, folder / Path(_GOLD).name) if p.exists()), None)
    path = path or BENCHMARK.need(folder, _GOLD)
    golds = layouts.check_fields(layouts.read_json(path), {}, str(path))
    for name, gold in golds.items():
        layouts.check_fields(gold, _FIELDS, f"{path}, question {name}")
    known = {row["question_id"] for row in asked}
    odd = [name for name in known if name not in golds]
    odd += [name for name, gold in golds.items() if gold["isBalanced"] and name not in known]
    if odd:
        raise InputError(
            f"gqa: {len(odd)} questions are in one of {_ASKED} and {path} only:"
            f" {layouts.listed(odd)}. Use files of the same version."
        )
    pictures = folder / "data" / "images"
    found = [
        _question(
            row["question_id"], row["text"], pictures / row["image"], golds[row["question_id"]]
        )
        for row in asked
    ]
    return layouts.check_keys("gqa", found)


def _from_parquet(folder: Path, files: Sequence[Path]) -> list[Question]:
    rows = layouts.read_parquet(files, {"id": str, "imageId": str, **_FIELDS}, ("semantic",))
    pattern = "testdev_balanced_images/testdev-*.parquet"
    pictures = {
        row["id"]: row["image"]
        for row in layouts.read_parquet(
            layouts.parquet_files(folder, pattern), {"id": str, "image": bytes}
        )
    }
    lacking = [row["id"] for row in rows if not pictures.get(row["imageId"])]
    if lacking:
        raise InputError(
            f"gqa: {len(lacking)} questions have no image in {pattern} below {folder}:"
            f" {layouts.listed(lacking)}. Get those files again."
        )
    return [
        _question(row["id"], row["question"] + layouts.SHORT, pictures[row["imageId"]], row)
        for row in rows
    ]


def _question(name: str, text: str, image: Path | bytes, gold: Mapping[str, Any]) -> Question:
    fields = {"structural": str, "semantic": str}
    layouts.check_fields(gold["types"], fields, f"gqa, the types of question {name}")
    if gold.get("semantic") is not None:
        layouts.check_fields(gold, {"semantic": list}, f"gqa, question {name}")
        for step in gold["semantic"]:
            layouts.check_fields(step, {"operation": str}, f"gqa, the steps of question {name}")
    kept = {field: gold[field] for field in _FIELDS} | {"semantic": gold.get("semantic")}
    return Question(key=name, question_id=name, text=text, prompt=text, image=image, gold=kept)


def converted(text: str) -> str:
    """What LLaVA hands to the official scorer."""
    return text.rstrip(".").lower()


def _without_marks(text: str) -> str:
    return text.strip().lower().translate(_NO_PUNCTUATION)


def _steps(semantic: Sequence[Mapping[str, Any]]) -> int:
    """Operations of a question without the last, asking one, as the official script counts."""
    last = ("exist", "query: name", "choose name")
    names = [f"{step['operation']}: {step.get('argument')}" for step in semantic]
    return sum(not any(word in name for word in last) for name in names)


def _details(
    counted: Sequence[Question], said: Mapping[str, str], right: Mapping[str, float]
) -> dict[str, Any]:
    """All that the official script prints, in percent and with numbers of questions."""

    def table(group: Callable[[Mapping[str, Any]], Any]) -> dict[str, dict[str, float]]:
        of_group = defaultdict(list)
        for question in counted:
            of_group[group(question.gold)].append(right[question.key])
        return {
            str(name): {"accuracy": percent(of_group[name]), "n": len(of_group[name])}
            for name in sorted(of_group)
        }

    kinds = table(lambda gold: "open" if gold["types"]["structural"] == "query" else "binary")
    details = {
        "binary": kinds.get("binary", {}).get("accuracy", 0.0),
        "open": kinds.get("open", {}).get("accuracy", 0.0),
        "validity": 0.0,  # these two need a choices file, which testdev has not; the script says 0
        "plausibility": 0.0,
        "distribution": _distribution(counted, said),
        "structural type": table(lambda gold: gold["types"]["structural"]),
        "semantic type": table(lambda gold: gold["types"]["semantic"]),
        "words number": table(lambda gold: len(gold["question"].split())),
    }
    if all(q.gold["semantic"] is not None for q in counted):  # parquet files lack it
        details["steps number"] = table(lambda gold: _steps(gold["semantic"]))
    return details


def _distribution(counted: Sequence[Question], said: Mapping[str, str]) -> float:
    """Chi-square of the answers given, by global group, weighted by its size, / 100."""
    gold, given = defaultdict(Counter), defaultdict(Counter)
    for question in counted:
        group = question.gold["groups"].get("global")
        if group is not None:
            gold[str(group)][question.gold["answer"]] += 1
            given[str(group)][said.get(question.key)] += 1
    total = sum(n.total() for n in gold.values())
    weighted = 0.0
    for group, numbers in gold.items():
        chi = sum((given[group][answer] - n) ** 2 / n for answer, n in numbers.items())
        weighted += chi * numbers.total()
    return weighted / total / 100 if total else 0.0


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("gqa", questions, answers)
    counted = [q for q in questions if q.gold["isBalanced"]]
    said = {q.key: converted(answers[q.key].text) for q in questions if q.key in answers}
    official = {q.key: float(said.get(q.key) == q.gold["answer"]) for q in counted}
    tolerant = {
        q.key: float(
            q.key in answers
            and _without_marks(answers[q.key].text) == _without_marks(q.gold["answer"])
        )
        for q in counted
    }
    missing = {"missing": sum(q.key not in answers for q in counted)}  # count as wrong
    return Scores(
        headline="official",
        rules={
            "official": Rule.mean_of(official, _details(counted, said, official) | missing),
            "lmms_eval": Rule.mean_of(tolerant, missing),
        },
        parsed=said,
        unparsed=[key for key, text in said.items() if not text],
    )


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """The official scorer's predictions file, as LLaVA converts answers."""
    layouts.check_all_answered("gqa", questions, answers)
    rows = [
        {"questionId": str(q.question_id), "prediction": converted(answers[q.key].text)}
        for q in questions
    ]
    return [layouts.write_json(out / "testdev_balanced_predictions.json", rows)]


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    files={
        _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        _GOLD: "questions1.2.zip of cs.stanford.edu/people/dorarad/gqa",
        "data/images": "images.zip of cs.stanford.edu/people/dorarad/gqa",
        "testdev_balanced_*/testdev-*.parquet": "lmms-lab/GQA on the Hugging Face hub, instead",
    },
    metric="exact match, %",
    paper={
        "LLaVA-1.5 7B": 62.0,
        "LLaVA-Mini 7B": 60.9,
        "LLaVA-Mini 7B HD": 61.8,
        "LLaVA-Mini 8B": 61.3,
    },
    max_new_tokens=128,
    questions=_questions,
    score=_score,
    submission=_submission,
)
