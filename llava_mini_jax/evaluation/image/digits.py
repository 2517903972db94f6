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

import numpy as np

from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Scores
from llava_mini_jax.evaluation.rules import exact_match

KINDS = ("position", "row", "column", "largest")
SEED = 2501_03895  # the paper's number at arXiv; any would do
EACH = 250  # questions of a kind
SCALE = 16  # times as large as it is, a page is shown to people
DENSE = {"rows": 6, "columns": 6, "page_size": 60}  # two pages' resolution
# Small pages and whole sentences, for configs/smollm_digits.py.
ENGLISH = {"rows": 3, "columns": 1, "wording": "english"}


def _questions(folder: Path, kinds: tuple[str, ...] = KINDS, **pages_of: Any) -> list[Question]:
    del folder
    found = []
    for kind in kinds:
        asked = DigitsConfig(split="heldout", kinds=(kind,), seed=SEED, **pages_of)
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

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # The n-th question of the n-th kind: the first ones of all kinds may be about one page.
    kinds = list(dict.fromkeys(q.key.split("-")[0] for q in questions))
    of_kind = [[q for q in questions if q.key.startswith(f"{kind}-")] for kind in kinds[:3]]
    chosen = [found[min(n, len(found) - 1)] for n, found in enumerate(of_kind) if found]
    wide = max(len(chosen), 2)  # of one page alone, the words below would not fit
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.6 * wide, 5.0), squeeze=False)
    for axis, question in zip(axes[0], chosen, strict=True):
        _draw(axis, question, answers)
    right = sum(_is_right(question, answers) for question in questions)
    shown = sum(_is_right(question, answers) for question in chosen)
    figure.suptitle("Pages in handwriting that training has never shown", fontsize=13)
    of_all = f"{right:,} of all {len(questions):,}"
    said = f"{shown} of these {len(chosen)} answers, and {of_all}, are exact."
    if shown < len(chosen):
        said += " The pages are not picked: a small model misreads one now and then."
    figure.text(0.5, 0.02, said, ha="center", fontsize=9, color="dimgray")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "digits.png", dpi=130)
    plt.close(figure)
    _page(questions[0]).save(folder / "page.png")
    return [
        f"examples: {folder / 'digits.png'}",
        f'try: llava-mini ask MODEL --image {folder / "page.png"} "{questions[0].text}"',
    ]


def _draw(axis: Any, question: Question, answers: Mapping[str, Output]) -> None:
    """A page in a frame, its question above and the answer below."""
    axis.imshow(_page(question))
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(color="dimgray", linewidth=1.5)
    axis.set_title(question.text, fontsize=10)
    answer = answers[question.key].text if question.key in answers else ""
    right = _is_right(question, answers)
    said = f"answer: {answer or 'none'}" + ("" if right else f"\nthe page says: {question.gold}")
    axis.set_xlabel(said, fontsize=11, color="darkgreen" if right else "firebrick", labelpad=8)


def _is_right(question: Question, answers: Mapping[str, Output]) -> bool:
    return question.key in answers and answers[question.key].text.split() == question.gold.split()


def _page(question: Question) -> Any:
    from PIL import Image

    assert isinstance(question.image, bytes)
    with Image.open(io.BytesIO(question.image)) as page:
        return enlarged(np.asarray(page))


def enlarged(page_HWC: np.ndarray) -> Any:
    """The page as a Pillow image, large and smooth enough for people.

    With this filter a model that is asked about it sees, once it has made it small again, what it
    would see of the page itself: nearer than with any other of Pillow's, larger squares included.
    """
    from PIL import Image

    height, width = page_HWC.shape[:2]
    size = (SCALE * width, SCALE * height)
    return Image.fromarray(page_HWC).resize(size, Image.Resampling.LANCZOS)


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
    dataclasses.replace(
        _DIGITS,
        name="digits_english",
        title="digits, in English",
        questions=functools.partial(_questions, kinds=("row", "read"), **ENGLISH),
    ),
]
