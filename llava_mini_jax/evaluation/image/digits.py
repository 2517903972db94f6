"""The built-in world's own benchmark: questions about pages of digits that no training has shown.

held-out pages, n of each kind --model.generate, greedy--> answers --exact match--> Score by kind
                                                              '--> table, picture of examples
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data.digits import DigitsConfig, DigitsPages
from llava_mini_jax.inference.model import Model

KINDS = ("position", "row", "column", "largest")
SEED = 2501_03895


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    image: Any  # uint8 [H, W, 3]
    text: str
    truth: str


@dataclasses.dataclass(frozen=True)
class Score:
    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def standard_error(self) -> float:
        return (self.accuracy * (1 - self.accuracy) / self.asked) ** 0.5


def questions(page_size: int, each: int) -> list[Question]:
    """`each` questions of every kind, the same for every model of this page size."""
    found = []
    for kind in KINDS:
        config = DigitsConfig(page_size=page_size, split="heldout", kinds=(kind,), seed=SEED)
        for item in DigitsPages(config, each):
            human, gpt = (turn["value"] for turn in item["conversations"])
            text = human.removeprefix("<image>").strip()
            found.append(Question(kind, item["image"], text, gpt))
    return found


def ask(model: Model, asked: Sequence[Question], *, batch_size: int = 64) -> list[str]:
    """The model's answer to every question, greedy."""
    from rich.console import Console
    from rich.progress import track

    answers: list[str] = []
    starts = range(0, len(asked), batch_size)
    for start in track(starts, "answering", console=Console(stderr=True), transient=True):
        batch = asked[start : start + batch_size]
        answers += model.generate(
            [question.text for question in batch],
            images=[[question.image] for question in batch],
            max_new_tokens=16,
            batch_size=batch_size,
        )
    return answers


def score(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, Score]:
    """Exactly right answers by kind, and over "all"."""
    right = [a.split() == q.truth.split() for q, a in zip(asked, answers, strict=True)]
    scores = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        of_kind = [r for q, r in zip(asked, right, strict=True) if q.kind == kind]
        scores[kind] = Score(sum(of_kind), len(of_kind))
    return {**scores, "all": Score(sum(right), len(right))}


def draw_examples(
    asked: Sequence[Question], answers: Sequence[str], path: Path, count: int = 3
) -> None:
    """A picture of `count` pages of different kinds with question, answer and truth."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # The n-th question of the n-th kind: the first ones of all kinds may be about one page.
    of_kind = [[i for i, q in enumerate(asked) if q.kind == kind] for kind in KINDS[:count]]
    chosen = [found[min(n, len(found) - 1)] for n, found in enumerate(of_kind)]
    figure, axes = plt.subplots(1, count, figsize=(3.2 * count, 3.9))
    for axis, index in zip(axes, chosen, strict=True):
        question, answer = asked[index], answers[index]
        axis.imshow(question.image)
        axis.set_axis_off()
        right = answer.split() == question.truth.split()
        axis.set_title(
            f"{question.text}\nanswer: {answer}    truth: {question.truth}",
            fontsize=9,
            color="black" if right else "firebrick",
        )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_page(question: Question, path: Path, *, zoom: int = 16) -> None:
    """The page of a question as a PNG large enough for people."""
    from PIL import Image

    Image.fromarray(question.image.repeat(zoom, 0).repeat(zoom, 1)).save(path)
