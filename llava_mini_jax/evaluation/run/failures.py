"""What a model got wrong, to be looked at: one HTML file that holds all it shows.

Scores of the headline rule --below a half--> the first of them --question, expected, answer,
                                                 thumbnail--> OUT/MODEL/BENCHMARK/failures.html

Questions and answers are strangers' text: the template (failures.html) escapes all of it, and the
page allows itself no script and no address but its own images.
"""

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question, Scores
from llava_mini_jax.evaluation.run.answers import Joined
from llava_mini_jax.journal import write_whole

MOST = 200  # items of a page
SIDE = 256  # pixels of a thumbnail, at most
LONGEST = 2000  # characters of a question, an answer, or what is expected
RIGHT = 0.5  # what an item scores at least, of 1: most of VQA's humans agree
# What Unicode calls noncharacters: a block, and the last two of each of the 17 planes.
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(
    chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)
)
_CONTROLS = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_NONCHARACTERS}]")


def write(
    folder: Path,
    model: str,
    benchmark: Benchmark,
    questions: Sequence[Question],
    joined: Joined,
    scores: Scores,
) -> Path | None:
    """The page's path; None where items are graded, or not scored one by one."""
    rule = scores.rules[scores.headline]
    graded = benchmark.judge is not None and not set(rule.items.values()) <= {0.0, 1.0}
    if graded or not rule.items:
        return None
    from jinja2 import Environment

    wrong = [q for q in questions if rule.items.get(q.key, RIGHT) < RIGHT]
    template = files("llava_mini_jax.evaluation.run") / "failures.html"
    page = Environment(autoescape=True).from_string(template.read_text(encoding="utf-8"))
    text = page.render(
        title=_text(benchmark.title),
        model=_text(model),
        metric=benchmark.metric,
        value=f"{rule.value:.4g}",
        rule=scores.headline,
        wrong=len(wrong),
        counted=len(rule.items),
        side=SIDE,
        items=list(_items(wrong[:MOST], joined, scores)),
    )
    path = folder / "failures.html"
    # Plain ASCII, whatever encoding the machine writes in.
    write_whole(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return path


def _items(
    questions: Sequence[Question], joined: Joined, scores: Scores
) -> Iterator[dict[str, Any]]:
    for question in questions:
        answer = joined.answers.get(question.key)
        read = scores.parsed.get(question.key)
        picture, why = _thumbnail(question)
        yield {
            "key": _text(question.key),
            "question": _text(question.text),
            "expected": _text(_expected(question.gold)),
            "answer": _text("(no answer)" if answer is None else answer.text),
            "cut": answer is not None and bool(answer.cut),
            "read": None if read is None else _text(_expected(read)),
            "picture": picture,
            "why": _text(why),
        }


def _expected(gold: Any) -> str:
    """What is right, as the benchmark's own fields say it."""
    if isinstance(gold, Mapping):
        return "\n".join(f"{name}: {_expected(value)}" for name, value in gold.items())
    if isinstance(gold, list | tuple):
        return ", ".join(map(_expected, gold))
    return str(gold)


def _thumbnail(question: Question) -> tuple[str, str]:
    """(base64 of a JPEG, ""), or ("", why there is none)."""
    import numpy as np
    from PIL import Image

    from llava_mini_jax.data.media.image_file import load_image

    if isinstance(question.video, np.ndarray):
        image = Image.fromarray(question.video[len(question.video) // 2])
    elif question.video is not None:
        return "", f"video {question.video.name}"
    elif question.image is None:
        return "", "text alone"
    else:
        try:
            image = load_image(question.image)
        except InputError:
            return "", "the image cannot be read"
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode("ascii"), ""


def _text(text: str) -> str:
    """At most LONGEST characters, without those that are none in HTML."""
    short = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return _CONTROLS.sub("\ufffd", short)
