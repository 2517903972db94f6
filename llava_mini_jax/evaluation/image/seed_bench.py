"""SEED-Bench, first version: 14,233 questions about images and 5,009 about videos, four options.

    llava-seed-bench.jsonl --.
    SEED-Bench.json ---------+--by id--> Questions --> accuracy of both kinds together
    or data/test-*.parquet --'               '--> submission.jsonl

Of a video LLaVA shows the middle frame, as an image. The paper's figure is the total, not that of
the images. The headline takes the letter that stands alone. "llava" is LLaVA's rule, which counts
nothing but the bare letter: "B." is wrong. "first_character" is lmms-eval's.

LLaVA's ids are numbers where the official ones are digits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores, percent
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter

_ASKED, _LABELS = "llava-seed-bench.jsonl", "SEED-Bench.json"
_RELEASE = "SEED-Bench"  # the folder in which LLaVA-Mini's release has labels and images
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FIELDS = {
    **dict.fromkeys(("question_id", "question", "answer", "data_type", *_CHOICES), str),
    "question_type_id": int,
}
_KINDS = ("image", "video")
_TYPES = (  # in the order of question_type_id
    "Scene Understanding, Instance Identity, Instance Attributes, Instance Location, "
    "Instances Counting, Spatial Relation, Instance Interaction, Visual Reasoning, "
    "Text Understanding, Action Recognition, Action Prediction, Procedure Understanding"
)
TYPES = tuple(_TYPES.split(", "))


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _ASKED, "data/test-*.parquet", "test-*.parquet"):
        rows = layouts.read_parquet(parquet, {**_FIELDS, "image": list})
        found = [_question(row, _text(row), _middle(row)) for row in rows]
    else:
        found = _from_llava(folder)
    return layouts.check_keys("seed_bench", found)


def _from_llava(folder: Path) -> list[Question]:
    asked = {}
    path = BENCHMARK.need(folder, _ASKED)
    for row in layouts.read_json_lines(path, {"image": str, "text": str}):
        name = str(row.get("question_id"))
        if name in asked:
            raise InputError(f"seed_bench: question {name} appears twice in {path}; remove one.")
        asked[name] = row
    inner = folder / _RELEASE
    path = inner / _LABELS if (inner / _LABELS).exists() else BENCHMARK.need(folder, _LABELS)
    rows = layouts.check_fields(layouts.read_json(path), {"questions": list}, str(path))
    pictures = inner if inner.exists() else folder
    found, odd = [], []
    for number, row in enumerate(rows["questions"]):
        layouts.check_fields(row, _FIELDS, f"{path}, question {number}")
        line = asked.pop(str(_llavas_id(row["question_id"])), None)
        if line is None:
            odd.append(row["question_id"])
        else:
            found.append(_question(row, line["text"], pictures / line["image"]))
    layouts.check_same("seed_bench", [*odd, *asked], f"{_ASKED} and {path}")
    return found


def _llavas_id(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def _text(row: Mapping[str, Any]) -> str:
    choices = [f"{letter}. {row[c]}" for letter, c in zip("ABCD", _CHOICES, strict=True)]
    return "\n".join([row["question"], *choices]) + layouts.LETTER


def _middle(row: Mapping[str, Any]) -> bytes:
    """The middle one of a row's images (one, or frames of a video)."""
    pictures = row["image"]
    picture = pictures[len(pictures) // 2] if pictures else None
    if not isinstance(picture, Mapping) or not picture.get("bytes"):
        raise InputError(f"seed_bench: {row['question_id']} has no image; get the files again.")
    return picture["bytes"]


def _question(row: Mapping[str, Any], text: str, image: Path | bytes) -> Question:
    number, kind, name = row["question_type_id"], row["data_type"], row["question_id"]
    if not 1 <= number <= len(TYPES) or kind not in _KINDS or row["answer"] not in tuple("ABCD"):
        raise InputError(
            f"seed_bench: question {name} has the type {number}, data_type {kind!r} and answer"
            f" {row['answer']!r}; expected 1 to {len(TYPES)}, image or video, and A to D."
        )
    return Question(
        key=name,
        question_id=_llavas_id(name),
        text=text,
        prompt=text,
        image=image,
        gold={"letter": row["answer"], "type": TYPES[number - 1], "kind": kind},
    )


def _rule(questions: Sequence[Question], said: Mapping[str, str]) -> Rule:
    items = {q.key: float(said.get(q.key) == q.gold["letter"]) for q in questions}
    groups: dict[str, list[float]] = {name: [] for name in (*_KINDS, *TYPES)}
    for question in questions:
        groups[question.gold["kind"]].append(items[question.key])
        groups[question.gold["type"]].append(items[question.key])
    parts = {name: percent(own) for name, own in groups.items() if own}
    return Rule.mean_of(items, {"parts": parts, "missing": len(questions) - len(said)})


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("seed_bench", questions, answers)
    texts = layouts.texts(questions, answers)
    said = {
        "letter": {key: lone_letter(text, "ABCD") for key, text in texts.items()},
        "llava": {key: text if text in tuple("ABCD") else "" for key, text in texts.items()},
        "first_character": {
            key: first if (first := text.strip()[:1].upper()) in tuple("ABCD") else ""
            for key, text in texts.items()
        },
    }
    return Scores(
        headline="letter",
        rules={name: _rule(questions, own) for name, own in said.items()},
        parsed=said["letter"],
        unparsed=[key for key, letter in said["letter"].items() if not letter],
        readings=said,
    )


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """Lines of official ids and raw answers, in the official order."""
    layouts.check_all_answered("seed_bench", questions, answers)
    rows = [{"question_id": q.key, "prediction": answers[q.key].text} for q in questions]
    return [layouts.write_json_lines(out / "submission.jsonl", rows)]


BENCHMARK = Benchmark(
    name="seed_bench",
    title="SEED-Bench",
    folder="seed_bench",
    files={
        _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        _LABELS: "AILab-CVC/SEED-Bench on the Hugging Face hub",
        "SEED-Bench-image": "AILab-CVC/SEED-Bench on the Hugging Face hub",
        "SEED-Bench-video-image": "its videos' middle frames, by the script in LLaVA's eval.zip",
        "data/test-*.parquet": "lmms-lab/SEED-Bench on the Hugging Face hub, instead of all these",
    },
    metric="accuracy on images and videos, %",
    paper={
        "LLaVA-1.5 7B": 58.6,
        "LLaVA-Mini 7B": 58.5,
        "LLaVA-Mini 7B HD": 60.2,
        "LLaVA-Mini 8B": 63.0,
    },
    max_new_tokens=128,
    questions=_questions,
    score=_score,
    submission=_submission,
)
