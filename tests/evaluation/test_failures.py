"""The page of what a model got wrong: bounded, whole in one file, and nothing in it but text."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini_jax.evaluation.benchmark import Output, Question, find
from llava_mini_jax.evaluation.rules import exact_match
from llava_mini_jax.evaluation.run import failures
from llava_mini_jax.evaluation.run.answers import Joined
from tests import tiny_model

NASTY = (
    "</dd></dl><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;b&gt; & &amp; \x00\x1b[31m \udc00 \ufffe \u202e",
    "<!-- -->]]><?php ?>",
    "javascript:alert(1)//'`",
    "\ufdd0 \ufdef \U0001ffff \U0010fffe",
)


class Page(HTMLParser):
    """Tags in their order, the texts of <dd>, the addresses of images."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self._inside = tag == "dd"
        if self._inside:
            self.texts.append("")
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "dd"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def page_of(folder: Path, questions: list[Question], said: dict[str, str]) -> str:
    answers = {
        key: Output(text=text, prompt="", cut=key == "q0", line={}) for key, text in said.items()
    }
    scores = exact_match.score(questions, answers, lambda question: "all")
    joined = Joined(answers=answers, missing=(), unknown=(), repeated=())
    found = failures.write(folder, "m", find("digits"), questions, joined, scores)
    assert found is not None
    return found.read_text(encoding="ascii")


def asked(number: int, text: str, gold: str, image: Any = None, video: Any = None) -> Question:
    key = f"q{number}"
    return Question(
        key=key, question_id=key, text=text, prompt=text, image=image, video=video, gold=gold
    )


def test_the_first_failures_are_shown_with_their_pictures(tmp_path: Path) -> None:
    content = tiny_model.write_picture(tmp_path / "a.png", 0).read_bytes()
    big = io.BytesIO()
    Image.fromarray(tiny_model.picture(1, 900, 1200)).save(big, "PNG")
    frames = np.zeros((3, 40, 40, 3), np.uint8)
    (tmp_path / "broken.png").write_bytes(content[:40])
    questions = [
        asked(0, "what?", "a cat", content),
        asked(1, "right?", "yes", content),
        asked(2, "large?", "no", big.getvalue()),
        asked(3, "broken?", "no", tmp_path / "broken.png"),
        asked(4, "film?", "no", video=tmp_path / "clip.mp4"),
        asked(5, "frames?", "no", video=frames),
        asked(6, "unanswered?", "no"),
    ]
    said = {f"q{n}": "yes" for n in range(6)}
    text = page_of(tmp_path, questions, said)
    page = Page(text)
    assert "6 of 7 items that count are wrong" in re.sub(r"\s+", " ", text)
    assert page.texts[:4] == ["what?", "a cat", "yes", "yes"]
    assert "right?" not in page.texts and "(no answer)" in page.texts
    for why in ("the image cannot be read", "video clip.mp4", "text alone"):
        assert why in text
    sizes = []
    for address in page.pictures:
        head, _, data = address.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            sizes.append(image.size)
    assert sizes == [(40, 30), (256, 192), (40, 40)]


def test_a_page_is_bounded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    questions = [asked(n, "x" * 10_000, "no", content.getvalue()) for n in range(230)]
    text = page_of(tmp_path, questions, {})
    assert Page(text).tags.count("article") == 200 and len(text) < 200 * 80_000
    assert "these are the first 200" in re.sub(r"\s+", " ", text)
    assert len(Page(text).texts[0]) == failures.LONGEST + len(" ...")


TEXTS = st.one_of(st.sampled_from(NASTY), st.text(max_size=60))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(question=TEXTS, gold=TEXTS, answer=TEXTS)
def test_whatever_stands_in_a_text_stays_text(
    tmp_path: Path, question: str, gold: str, answer: str
) -> None:
    plain = Page(page_of(tmp_path, [asked(0, "what", "x")], {"q0": "wrong"}))
    wrong = f"{answer} wrong"
    page = Page(page_of(tmp_path, [asked(0, question, gold)], {"q0": wrong}))
    if wrong.split() == gold.split():
        return
    assert page.tags == plain.tags
    shown = [failures._text(text) for text in (question, gold, wrong)]
    assert page.texts[:3] == [re.sub("\r\n?", "\n", text) for text in shown]


def test_graded_items_have_no_page(tmp_path: Path) -> None:
    questions = [asked(0, "what?", "x")]
    scores = exact_match.score(questions, {}, lambda question: "all")
    graded = find("mmvet")
    joined = Joined(answers={}, missing=(), unknown=(), repeated=())
    object.__setattr__(scores.rules["exact"], "items", {"q0": 0.3})
    assert failures.write(tmp_path, "m", graded, questions, joined, scores) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("yes", "yes"),
        ({"answers": ["a", "b"], "type": None}, "answers: a, b\ntype: None"),
        ({"label": {"x": 1}}, "label: x: 1"),
    ],
)
def test_expected(gold: Any, expected: str) -> None:
    assert failures._expected(gold) == expected
