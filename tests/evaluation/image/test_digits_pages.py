"""The images that the digits world leaves for people: legible, and honest about mistakes."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from configs import digits as config
from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.evaluation.benchmark import Output, find

RIGHT = Output(text="", prompt="", cut=False, line={})


def test_examples_say_which_answers_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    save = Figure.savefig

    def seen(figure: Figure, *named, **options) -> None:
        said.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *named, **options)

    monkeypatch.setattr(Figure, "savefig", seen)
    benchmark = find("digits")
    questions = benchmark.questions(tmp_path)[:40]
    answers = {q.key: dataclasses.replace(RIGHT, text=q.gold) for q in questions}
    wrong = next(q for q in questions if q.key == "column-2")
    answers[wrong.key] = dataclasses.replace(RIGHT, text="3 1")
    assert benchmark.illustrate is not None
    benchmark.illustrate(questions, answers, tmp_path)
    assert f"answer: 3 1\nthe page says: {wrong.gold}" in said
    assert sum(text.startswith("answer: ") and "\n" not in text for text in said) == 2
    (note,) = (text for text in said if "exact" in text)
    assert note.startswith("2 of these 3 answers, and 39 of all 40, are exact. The pages are not")
    with Image.open(tmp_path / "digits.png") as image:
        assert image.width > 2 * image.height > 1000


def test_the_page_to_ask_about_is_smooth_and_the_same_to_a_model(tmp_path: Path) -> None:
    benchmark = find("digits")
    questions = benchmark.questions(tmp_path)[:4]
    assert benchmark.illustrate is not None
    benchmark.illustrate(questions, {}, tmp_path)
    images = config.config().stage2.images
    with Image.open(tmp_path / "page.png") as large:
        shown = preprocess(large, images).astype(int)
        steps = np.abs(np.diff(np.asarray(large.convert("L"), int), axis=1))
    squares = large.resize((30, 30), Image.Resampling.BOX).resize(large.size, 0)
    assert steps.max() < np.abs(np.diff(np.asarray(squares.convert("L"), int), axis=1)).max() / 2
    assert isinstance(questions[0].image, bytes)
    raw = Image.open(io.BytesIO(questions[0].image))
    assert np.abs(shown - preprocess(raw, images)).mean() < 6  # of 255 levels
