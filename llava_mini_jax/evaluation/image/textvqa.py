"""TextVQA, val: what do the words in this image say? With the words an OCR system read.

    llava_textvqa_val_v051_ocr.jsonl --.
    TextVQA_0.5.1_val.json ---by image and question---> Questions --> VQA accuracy, M4C's rule
    or data/validation-*.parquet ------'

LLaVA's question_id is the image, so the question is recovered from the prompt: it stands before
or after the line of OCR words. Parquet files have the words in a column; the line is made of it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules import normalise

_ASKED = "llava_textvqa_val_v051_ocr.jsonl"
_GOLD = "TextVQA_0.5.1_val.json"
_OCR = "Reference OCR token: "
_FIELDS = {"question_id": int, "image_id": str, "question": str, "answers": list}
_HUMANS = 10


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _ASKED, "data/validation-*.parquet"):
        return layouts.check_keys("textvqa", _from_parquet(parquet))
    fields = {"question_id": str, "image": str, "text": str}
    rows = layouts.read_json_lines(BENCHMARK.need(folder, _ASKED), fields)
    path = BENCHMARK.need(folder, _GOLD)
    listed = layouts.check_fields(layouts.read_json(path), {"data": list}, str(path))["data"]
    golds: dict[str, list[Mapping[str, Any]]] = {}
    for number, gold in enumerate(listed, 1):
        layouts.check_fields(gold, _FIELDS, f"{path}, item {number}")
        golds.setdefault(_key(gold["image_id"], gold["question"]), []).append(gold)
    found, odd, seen = [], [], Counter()
    for number, row in enumerate(rows, 1):
        asked = question_of(row["text"])
        if asked is None:
            raise InputError(f"{folder / _ASKED}, line {number}: no question is in {row['text']!r}")
        key = _key(row["question_id"], asked)
        if seen[key] < len(golds.get(key, ())):
            image = folder / "train_images" / row["image"]
            found.append(_question(row["text"], image, golds[key][seen[key]], seen[key]))
        else:
            odd.append(key)
        seen[key] += 1
    odd += [key for key, same in golds.items() if seen[key] < len(same)]
    layouts.check_same("textvqa", odd, f"{_ASKED} and {path}")
    return layouts.check_keys("textvqa", found)


def _from_parquet(files: Sequence[Path]) -> list[Question]:
    found, seen = [], Counter()
    for row in layouts.read_parquet(files, {**_FIELDS, "image": bytes, "ocr_tokens": list}):
        question = row["question"].capitalize()  # as LLaVA's file has it
        text = f"{question}\n{_OCR}{', '.join(row['ocr_tokens'])}{layouts.SHORT}"
        key = _key(row["image_id"], row["question"])
        found.append(_question(text, row["image"], row, seen[key]))
        seen[key] += 1
    return found


def _question(text: str, image: Path | bytes, gold: Mapping[str, Any], before: int) -> Question:
    """`before`: how many questions about this image are the same; they are asked again."""
    humans = gold["answers"]
    if len(humans) != _HUMANS or not all(isinstance(answer, str) for answer in humans):
        raise InputError(
            f"textvqa: question {gold['question_id']} has {len(humans)} human answers; expected"
            f" {_HUMANS} strings. Get the file again."
        )
    key = _key(gold["image_id"], gold["question"])
    return Question(
        key=f"{key} ({before + 1})" if before else key,
        question_id=gold["image_id"],
        text=text,
        prompt=text,
        image=image,
        gold={"answers": humans, "question_id": gold["question_id"], "first": key},
    )


def _key(image: str, question: str) -> str:
    return f"{image}: {question.lower()}"


def question_of(prompt: str) -> str | None:
    """The question of a prompt in any of the forms that LLaVA's scorer knows; None for others."""
    if prompt.startswith("OCR tokens: "):
        found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found and found[1]
    lines = prompt.split("\n")
    if len(lines) == 3 and _OCR in prompt:
        return lines[1] if prompt.startswith(_OCR.rstrip()) else lines[0]
    return lines[0] if len(lines) == 2 else None


def _key_of(line: Mapping[str, Any]) -> str:
    question = question_of(str(line.get("prompt", "")))
    return _key(str(line.get("question_id")), "" if question is None else question)


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    said = {}
    for question in questions:
        # Others' files do not tell the same question about the same image apart.
        answer = answers.get(question.key) or answers.get(question.gold["first"])
        if answer is not None:
            said[question.key] = normalise.m4c(answer.text)
    items = {}
    for question in questions:
        humans = [normalise.m4c(answer) for answer in question.gold["answers"]]
        key = question.key
        items[key] = normalise.leave_one_out(said[key], humans) if key in said else 0.0
    rule = Rule.mean_of(items, {"missing": len(items) - len(said)})  # these count as wrong
    return Scores(
        headline="official",
        rules={"official": rule, "lmms_eval": rule},  # the same rule in both tools
        parsed=said,
        unparsed=[key for key, text in said.items() if not text],
    )


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    files={
        _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        _GOLD: "textvqa.org/dataset",
        "train_images": "train_val_images.zip of textvqa.org/dataset",
        "data/validation-*.parquet": "lmms-lab/textvqa on the Hugging Face hub, instead",
    },
    metric="VQA accuracy, %",
    paper={
        "LLaVA-1.5 7B": 58.2,
        "LLaVA-Mini 7B": 57.0,
        "LLaVA-Mini 7B HD": 59.1,
        "LLaVA-Mini 8B": 58.5,
    },
    max_new_tokens=128,
    questions=_questions,
    score=_score,
    key_of=_key_of,
)
