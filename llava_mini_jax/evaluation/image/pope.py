"""POPE: does the image show this object? COCO images, objects drawn in three ways.

    llava_pope_test.jsonl        --------------.
    coco/coco_pope_{SPLIT}.json  ---by image and question---> Questions --> F1 per split, their mean
    or Full/{SPLIT}-*.parquet    ----(they bring both)----'

The official scorer joins labels and answers by their place in the file, so label files of another
version (3,000 random questions where LLaVA asks 2,910) halve a score without a word. Here a label
belongs to an image and a question, whatever the order ("imange", as the label files spell it in
places, is "image"), and files that do not fit are refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores

SPLITS = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}  # what LLaVA adds to ids
_ASKED = "llava_pope_test.jsonl"
_COLUMNS = {"question_id": str, "question": str, "answer": str, "image": bytes, "category": str}


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _ASKED, "Full/*.parquet", "data/test-*.parquet"):
        return layouts.check_keys("pope", _from_parquet(parquet))
    fields = {"question_id": int, "image": str, "text": str, "category": str}
    asked = layouts.read_json_lines(BENCHMARK.need(folder, _ASKED), fields)
    labels = _labels(folder, asked)
    found = []
    for row in asked:
        found.append(
            Question(
                key=str(row["question_id"]),
                question_id=row["question_id"],
                text=row["text"],
                prompt=row["text"],
                image=folder / "val2014" / row["image"],
                gold={"label": labels[_place(row)], "split": row["category"]},
            )
        )
    return layouts.check_keys("pope", found)


def _labels(folder: Path, asked: Sequence[Mapping]) -> dict[tuple[str, str, str], str]:
    """The label of each split, image and question. Refuses files that are not about these."""
    labels: dict[tuple[str, str, str], str] = {}
    fields = {"image": str, "text": str, "label": str}
    for split in SPLITS:
        path = BENCHMARK.need(folder, f"coco/coco_pope_{split}.json")
        rows = layouts.read_json_lines(path, fields)
        wanted = [row for row in asked if row["category"] == split]
        if len(rows) != len(wanted):
            raise InputError(
                f"{path} has {len(rows)} labels, {_ASKED} has {len(wanted)} {split} questions; use"
                f" files of the same version: {_FILES['coco/coco_pope_random.json']}."
            )
        for row in rows:
            place = _place({**row, "category": split})
            if labels.setdefault(place, row["label"]) != row["label"]:
                raise InputError(f"{path}: two labels for {', '.join(place[1:])}; get it again.")
            _check_label(row["label"], f"{path}, {', '.join(place[1:])}")
    unknown = [str(row["question_id"]) for row in asked if _place(row) not in labels]
    if unknown:
        raise InputError(
            f"pope: {len(unknown)} of {len(asked)} questions have no label for their image and"
            f" text: {layouts.listed(unknown)}. Use label files that belong to {_ASKED}."
        )
    return labels


def _place(row: Mapping) -> tuple[str, str, str]:
    text = _spelled(row["text"].removesuffix(layouts.SHORT))
    return row["category"], row["image"], text


def _spelled(text: str) -> str:
    return text.replace("imange", "image")


def _from_parquet(files: Sequence[Path]) -> list[Question]:
    found = []
    for row in layouts.read_parquet(files, _COLUMNS):
        if row["category"] not in SPLITS or not row["question_id"].isdecimal():
            raise InputError(
                f'pope: question "{row["question_id"]}" of "{row["category"]}" in'
                f" {files[0].parent} has no number or none of the splits {', '.join(SPLITS)}; get"
                " the files again."
            )
        number = SPLITS[row["category"]] + int(row["question_id"])
        _check_label(row["answer"], f"{files[0].parent}, question {number}")
        text = _spelled(row["question"]) + layouts.SHORT
        found.append(
            Question(
                key=str(number),
                question_id=number,
                text=text,
                prompt=text,
                image=row["image"],
                gold={"label": row["answer"], "split": row["category"]},
            )
        )
    return found


def _check_label(label: str, place: str) -> None:
    if label not in ("yes", "no"):
        raise InputError(f'{place}: the label is {label!r}; expected "yes" or "no".')


def read_official(text: str) -> str:
    """ "no" if a word before the first period is No, no or not; all else is "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_exact(text: str) -> str:
    """lmms-eval's: all of the answer is yes or no; "" for neither."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else ""


def _counts(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of pairs (label, said): "yes" is positive; a quotient of nothing is 0."""
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    true_no, false_no = pairs.count(("no", "no")), pairs.count(("yes", "no"))
    said_yes, yes_labels_read = true_yes + false_yes, true_yes + false_no
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / yes_labels_read if yes_labels_read else 0.0
    both, n = precision + recall, len(pairs) or 1
    return {
        "TP": true_yes,
        "FP": false_yes,
        "TN": true_no,
        "FN": false_no,
        "n": len(pairs),
        "accuracy": (true_yes + true_no) / n,
        "precision": precision,
        "recall": recall,
        "f1_score": 2 * precision * recall / both if both else 0.0,
        "yes_ratio": said_yes / n,
        "yes_ratio_of_labels": sum(label == "yes" for label, _ in pairs) / n,
    }


def _rule(read, questions: Sequence[Question], answers: Mapping[str, Output]) -> Rule:
    said = {}
    for question in questions:
        # A question without an answer is answered wrongly: no count, so no F1, leaves it out.
        wrong = "no" if question.gold["label"] == "yes" else "yes"
        answer = answers.get(question.key)
        said[question.key] = wrong if answer is None else read(answer.text)
    splits = {}
    for split in dict.fromkeys(question.gold["split"] for question in questions):
        asked = [q for q in questions if q.gold["split"] == split]
        splits[split] = _counts([(q.gold["label"], said[q.key]) for q in asked])
    details = {
        **splits,
        "all": _counts([(q.gold["label"], said[q.key]) for q in questions]),
        "missing": sum(q.key not in answers for q in questions),  # count as wrong
        "parts": {split: 100 * figures["f1_score"] for split, figures in splits.items()},
    }
    return Rule(
        value=100 * sum(c["f1_score"] for c in splits.values()) / (len(splits) or 1),
        items={q.key: float(said[q.key] == q.gold["label"]) for q in questions},
        scale=None,  # items are right or wrong; the value is F1
        details=details,
    )


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("pope", questions, answers, _spelled)
    parsed = {q.key: read_official(answers[q.key].text) for q in questions if q.key in answers}
    return Scores(
        headline="official",
        rules={
            "official": _rule(read_official, questions, answers),
            "lmms_eval": _rule(read_exact, questions, answers),
        },
        parsed=parsed,
        # Read as "yes" for want of a "no", and there is no yes either.
        unparsed=[
            k for k, v in parsed.items() if v == "yes" and "yes" not in answers[k].text.lower()
        ],
    )


_LABELS = "github.com/RUCAIBox/POPE at commit e3e3926, output/coco (later ones ask other questions)"
_FILES = {
    _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
    **{f"coco/coco_pope_{split}.json": _LABELS for split in SPLITS},
    "val2014": "COCO's val2014.zip (cocodataset.org)",
    "Full/*.parquet": "lmms-lab/POPE on the Hugging Face hub, instead of all these",
}

BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    files=_FILES,
    metric="mean F1 of adversarial, popular and random, %",
    paper={
        "LLaVA-1.5 7B": 85.9,
        "LLaVA-Mini 7B": 84.4,
        "LLaVA-Mini 7B HD": 85.3,
        "LLaVA-Mini 8B": 85.3,
    },
    max_new_tokens=128,
    questions=_questions,
    score=_score,
)
