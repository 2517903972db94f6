"""LLaVA-Bench (In-the-Wild): open questions, graded by a judge against a text-only GPT-4's answers.

    questions.jsonl, context.jsonl ---by image---.
    answers_gpt4.jsonl ---------------by id------+--> Questions --judge: "8 7" of 10--> 100 * 7/8
    or data/train-*.parquet (all of these) ------'                     '--> reviews/MODEL.jsonl

The judge reads the caption, the question and both answers, never the image. A reply whose first
line is not two numbers with one blank (or comma) between them is the pair [-1, -1] to the official
parser, and counts in its means: the tolerant rule reads more, and leaves out what it cannot read.
The official script joins its files line by line; here they are joined by id and by image.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Question, Rule, Scores
from llava_mini_jax.evaluation.judge import own_texts
from llava_mini_jax.evaluation.judge.judging import Judge, Judged, Ladder, Replies, scored_by
from llava_mini_jax.evaluation.judge.wording import messages

_NAME = "llava_bench"
_ASKED, _CONTEXT, _REFERENCE = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"
CATEGORIES = ("conv", "detail", "complex")


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _ASKED, "data/train-*.parquet"):
        texts = ("question_id", "question", "category", "caption", "gpt_answer")
        columns: dict[str, type] = {**dict.fromkeys(texts, str), "image": bytes}
        found = [
            _question(
                row["question_id"],
                row["question"],
                row["image"],
                category=row["category"],
                caption=row["caption"],
                reference=row["gpt_answer"],
            )
            for row in layouts.read_parquet(parquet, columns)
        ]
        return layouts.check_keys(_NAME, found)
    fields: dict[str, type] = {"image": str, "category": str, "text": str}
    asked = _by_id(BENCHMARK.need(folder, _ASKED), fields, "question_id")
    references = _by_id(BENCHMARK.need(folder, _REFERENCE), {"text": str}, "question_id")
    captions = _by_id(BENCHMARK.need(folder, _CONTEXT), {"image": str}, "image")
    odd = [name for name in asked if name not in references]
    odd += [f"{r['image']} of {name}" for name, r in asked.items() if r["image"] not in captions]
    if odd:
        raise InputError(
            f"{_NAME}: {len(odd)} questions have no line in {_REFERENCE}, or their image none in"
            f" {_CONTEXT}: {layouts.listed(odd)}. Use files of the same version."
        )
    found = [
        _question(
            row["question_id"],
            row["text"],
            folder / "images" / row["image"],
            category=row["category"],
            caption=captions[row["image"]].get("caption"),
            reference=references[name]["text"],
            reference_id=references[name].get("answer_id", ""),
        )
        for name, row in asked.items()
    ]
    return layouts.check_keys(_NAME, found)


def _by_id(path: Path, fields: Mapping[str, type], name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in layouts.read_json_lines(path, fields):
        if name not in row or str(row[name]) in found:
            raise InputError(
                f'{path}: "{name}" {row.get(name)} is missing or appears twice; correct it'
            )
        found[str(row[name])] = row
    return found


def _question(
    name: Any,
    text: str,
    image: Path | bytes,
    *,
    category: str,
    caption: Any,
    reference: str,
    reference_id: str = "",
) -> Question:
    if not image:
        raise InputError(f"{_NAME}: question {name} has no image; get the file again")
    lines = caption if isinstance(caption, list) else [caption]
    if category not in CATEGORIES or not all(isinstance(line, str) for line in lines):
        raise InputError(
            f"{_NAME}: question {name} is of category {category!r} with a caption {caption!r:.60};"
            f" expected one of {', '.join(CATEGORIES)}, and a text or a list of lines"
        )
    return Question(
        key=str(name),
        question_id=int(name) if str(name).isdigit() else name,
        text=text,
        prompt=text,
        image=image,
        gold={
            "category": f"llava_bench_{category}",
            "caption": "\n".join(lines),
            "reference": reference,
            "reference_id": reference_id,
        },
    )


def _ladders(judged: Judged, texts: Mapping[str, str], options: Mapping[str, Any]) -> list[Ladder]:
    """One request an item. A missing answer is judged as an empty one, so that it counts."""
    layouts.check_prompts(_NAME, judged.questions, judged.answers)
    # The official system message is in the script, not in rule.json.
    ours = texts == own_texts.LLAVA_BENCH
    system = own_texts.LLAVA_BENCH_SYSTEM if ours else own_texts.LLAVA_BENCH_OFFICIAL_SYSTEM
    found = []
    for question in judged.questions:
        gold, answer = question.gold, judged.answers.get(question.key)
        blocks = (
            f"[Context]\n{gold['caption']}\n\n",
            f"[Question]\n{question.text}\n\n",
            f"[Assistant 1]\n{gold['reference']}\n\n[End of Assistant 1]\n\n",
            f"[Assistant 2]\n{answer.text if answer else ''}\n\n[End of Assistant 2]\n\n",
            f"[System]\n{texts[gold['category']]}\n\n",
        )
        body = {
            "messages": messages("".join(blocks), system),
            "temperature": 0.2,
            "max_tokens": 1024,
        }
        found.append(Ladder(question.key, [body]))
    return found


def read_official(reply: str) -> tuple[float, float] | None:
    """The scores of reference and model in a reply; None for what the script makes [-1, -1]."""
    # Two blanks between the numbers make three parts, and so no pair, as in the script.
    pair = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(pair[0]), float(pair[1])) if len(pair) == 2 else None
    except ValueError:
        return None


def read_tolerant(reply: str) -> tuple[float, float] | None:
    """Two numbers from 1 to 10 in the first line with any, or in two lines that are one each.

    "8/10 7/10", "8.5,  9", "Assistant 1: 8, Assistant 2: 7", "8\\n7".
    """
    lines = [line.strip() for line in reply.splitlines()]
    lines = [re.sub(r"(?i)\bassistant\s*[12]\b", "", line) for line in lines]
    numbers = [[float(n) for n in _NUMBER.findall(_OUT_OF.sub("", line))] for line in lines]
    first = next((i for i, found in enumerate(numbers) if found), None)
    if first is None:
        return None
    pair = numbers[first]
    if len(pair) == 1 and _ALONE.fullmatch(lines[first]):
        following = [i for i in range(first + 1, len(lines)) if lines[i]][:1]
        if following and _ALONE.fullmatch(lines[following[0]]):
            pair = pair + numbers[following[0]]
    return (pair[0], pair[1]) if len(pair) == 2 and all(1 <= n <= 10 for n in pair) else None


_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w|\.\d)")
_OUT_OF = re.compile(r"\s*/\s*10\b|\s+out of 10\b")
_ALONE = re.compile(r"\d+(?:\.\d+)?(?:\s*/\s*10|\s+out of 10)?\.?")


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What the official summary prints: the means are rounded before they are divided."""
    if not pairs:
        return {"relative_score": math.nan, "gpt4_x10": math.nan, "model_x10": math.nan}
    reference, model = (round(mean, 3) for mean in np.asarray(pairs, float).mean(0).tolist())
    return {
        "relative_score": round(model / reference * 100, 1) if reference else math.nan,
        "gpt4_x10": round(reference * 10, 1),
        "model_x10": round(model * 10, 1),
    }


def _rule(
    questions: Sequence[Question],
    replies: Replies,
    read: Callable[[str], tuple[float, float] | None],
    unread: tuple[float, float] | None,
) -> Rule:
    """Scores by one reader; `unread` stands for what it cannot read, None leaves that out."""
    pairs: dict[str, tuple[float, float]] = {}
    lost = []
    for question in questions:
        reply = replies.final(question.key)
        pair = None if reply is None else read(reply)
        if pair is None and reply is not None:
            lost.append(question.key)
            pair = unread
        if pair is not None:
            pairs[question.key] = pair
    of = {q.key: q.gold["category"] for q in questions}
    parts = {
        name: summary([pair for key, pair in pairs.items() if of[key] == name])
        for name in sorted(set(of.values()))
    }
    whole = summary(list(pairs.values()))
    total = np.asarray(list(pairs.values()) or [(math.nan, math.nan)], float).sum(0).tolist()
    return Rule(
        value=replies.value(whole["relative_score"]),
        items={key: pair[1] / 10 for key, pair in pairs.items()},  # the model's score of ten
        scale=None,  # the value sets the model's mean against that of the reference
        details={
            "all": whole,
            **parts,
            "parts": {name: replies.value(part["relative_score"]) for name, part in parts.items()},
            "unrounded": 100 * total[1] / total[0] if total[0] else math.nan,
            "counted": len(pairs),
            "unread": lost,
            "judge": replies.about(),
        },
    )


def _score(judged: Judged, replies: Replies) -> Scores:
    questions = judged.questions
    layouts.check_prompts(_NAME, questions, judged.answers)
    said = {q.key: text for q in questions if (text := replies.final(q.key)) is not None}
    parsed = {key: read_official(text) or (-1, -1) for key, text in said.items()}
    return Scores(
        headline="official",
        rules={
            "official": _rule(questions, replies, read_official, (-1.0, -1.0)),
            "without unread": _rule(questions, replies, read_official, None),
            "tolerant": _rule(questions, replies, read_tolerant, None),
        },
        parsed={key: list(pair) for key, pair in parsed.items()},
        unparsed=[key for key, text in said.items() if read_official(text) is None],
    )


def _write(replies: Replies, out: Path, model_id: str) -> list[Path]:
    """The official reviews file, without pending items, which that script would ask for next."""
    judged, lines = replies.plan.judged, []
    for question in judged.questions:
        text, answer = replies.final(question.key), judged.answers.get(question.key)
        if text is None:
            break  # the script skips as many questions as the file has lines
        lines.append(
            {
                "id": len(lines) + 1,
                "question_id": question.question_id,
                "answer1_id": question.gold["reference_id"],
                "answer2_id": answer.line.get("answer_id", "") if answer else "",
                "category": question.gold["category"],
                "content": text,
                "tuple": list(read_official(text) or (-1, -1)),
            }
        )
    return [layouts.write_json_lines(out / "reviews" / f"{model_id}.jsonl", lines)]


_EVAL_ZIP = "liuhaotian/llava-bench-in-the-wild on the Hugging Face hub"
BENCHMARK = Benchmark(
    name=_NAME,
    title="LLaVA-Bench-in-the-Wild",
    folder="llava-bench-in-the-wild",
    files={
        _ASKED: _EVAL_ZIP,
        _CONTEXT: _EVAL_ZIP,
        _REFERENCE: _EVAL_ZIP,
        "images": _EVAL_ZIP,
        "data/train-*.parquet": "lmms-lab/llava-bench-in-the-wild there, instead of all these",
    },
    metric="judge's score relative to GPT-4's answers, %",
    paper={
        "LLaVA-1.5 7B": 63.4,
        "LLaVA-Mini 7B": 68.9,
        "LLaVA-Mini 7B HD": 69.3,
        "LLaVA-Mini 8B": 70.2,
    },
    max_new_tokens=128,  # the release's; LLaVA's own script gives 1024, and cuts no description
    questions=_questions,
    score=scored_by(_NAME, _score),
    judge=Judge(
        model="gpt-4-0314",
        ours=own_texts.LLAVA_BENCH,
        official=own_texts.LLAVA_BENCH_SHA256,
        source="llava/eval/table/rule.json of github.com/haotian-liu/LLaVA",
        ladders=_ladders,
        readable=lambda reply: True,  # it is asked once
        write=_write,
    ),
)
