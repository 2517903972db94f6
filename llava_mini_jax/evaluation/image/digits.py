"""The built-in world's own benchmark: questions about pages of digits that no training has shown.

    held-out pages, kinds taking turns --> Questions --exact match of words--> Scores by kind

It needs no data: the pages are drawn when they are asked for, the same ones each time.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Scores
from llava_mini_jax.evaluation.rules import exact_match

KINDS = ("position", "row", "column", "largest")
SEED = 2501_03895  # the paper's number at arXiv; any would do
EACH = 250  # questions of a kind
DENSE = {"rows": 6, "columns": 6, "page_size": 60}  # two pages' resolution


def _questions(folder: Path, **sizes: Any) -> list[Question]:
    del folder
    found = []
    for kind in KINDS:
        asked = DigitsConfig(split="heldout", kinds=(kind,), seed=SEED, **sizes)
        pages = DigitsPages(asked, EACH)
        found.append([_question(kind, number, pages[number]) for number in range(EACH)])
    return [question for one_of_each in zip(*found, strict=True) for question in one_of_each]


def _question(kind: str, number: int, item: Sample) -> Question:
    from PIL import Image

    assert "image" in item
    human, gpt = (turn["value"] for turn in item["conversations"])
    text = human.removeprefix("<image>").strip()
    page = io.BytesIO()
    Image.fromarray(item["image"]).save(page, "PNG")
    key = f"{kind}-{number}"
    return Question(
        key=key, question_id=key, text=text, prompt=text, image=page.getvalue(), gold=gpt
    )


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    del folder
    return exact_match.score(questions, answers, lambda question: question.key.split("-")[0])


def _illustrate(
    questions: Sequence[Question], answers: Mapping[str, Output], folder: Path
) -> list[str]:
    """digits.png, three pages with question, answer and truth; page.png, one to ask about."""
    import matplotlib
    from PIL import Image

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # The n-th question of the n-th kind: the first ones of all kinds may be about one page.
    of_kind = [[q for q in questions if q.key.startswith(f"{kind}-")] for kind in KINDS[:3]]
    chosen = [found[min(n, len(found) - 1)] for n, found in enumerate(of_kind) if found]
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen), 3.9), squeeze=False)
    for axis, question in zip(axes[0], chosen, strict=True):
        assert isinstance(question.image, bytes)
        answer = answers[question.key].text if question.key in answers else ""
        axis.imshow(Image.open(io.BytesIO(question.image)))
        axis.set_axis_off()
        axis.set_title(
            f"{question.text}\nanswer: {answer}    truth: {question.gold}",
            fontsize=9,
            color="black" if answer.split() == question.gold.split() else "firebrick",
        )
    figure.tight_layout()
    figure.savefig(folder / "digits.png", dpi=130)
    plt.close(figure)
    assert isinstance(questions[0].image, bytes)
    with Image.open(io.BytesIO(questions[0].image)) as page:  # large enough for people
        page.resize((16 * page.width, 16 * page.height), Image.Resampling.NEAREST).save(
            folder / "page.png"
        )
    return [
        f"examples: {folder / 'digits.png'}",
        f'try: llava-mini ask MODEL --image {folder / "page.png"} "{questions[0].text}"',
    ]


_DIGITS = Benchmark(
    name="digits",
    title="digits",
    folder="digits",
    files={},
    metric="exact match, %",
    paper={},
    max_new_tokens=16,
    questions=_questions,
    score=_score,
    illustrate=_illustrate,
)
BENCHMARKS = [
    _DIGITS,
    dataclasses.replace(
        _DIGITS,
        name="digits_dense",
        title="digits, dense",
        questions=functools.partial(_questions, **DENSE),
    ),
]
