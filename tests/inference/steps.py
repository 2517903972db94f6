"""Requests answered by the engine, with what each of its steps has added."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.inference import bounds, engine
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.ticket import Piece


class Said(NamedTuple):
    steps: list[list[Piece]]  # what each row was told, in order
    ids: list[list[int]]  # of each row
    answers: list[Answer]


def said(
    model: Model,
    examples: Sequence[Example],
    settings: Settings | Sequence[Settings],
    *,
    slots: int = 8,
    steps: int = bounds.STEPS,
) -> Said:
    """Settings of all examples, or of each."""
    if isinstance(settings, Settings):
        seeds = settings.seeds(len(examples))
        settings = [replace(settings, seed=seed) for seed in seeds]
    heard: list[list[Piece]] = [[] for _ in examples]

    def hear(number: int, piece: Piece) -> None:
        heard[number].append(piece)

    for _ in engine.answering(model, examples, settings, slots, hear, steps=steps):
        pass
    ids = [[token for piece in row for token in piece.ids] for row in heard]
    answers = [row[-1].answer for row in heard]
    assert all(answers)
    for row, answer in zip(heard, answers, strict=True):
        assert answer is not None
        assert "".join(piece.text for piece in row) == answer.text
        assert [piece.answer for piece in row[:-1]] == [None] * (len(row) - 1)
    return Said(heard, ids, [answer for answer in answers if answer])
