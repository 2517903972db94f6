"""An answers file while it is written, whoever answers: kept at once, nothing is asked twice.

questions --windows--> of a shard --those that are not `done`--> asked --write--> answers.jsonl
"""

import base64
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run.answers import join, line_of
from llava_mini_jax.inference.answer import Answer
from llava_mini_jax.journal import Journal


class Shard(NamedTuple):
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @property
    def file(self) -> str:
        one = self.count == 1
        return "answers.jsonl" if one else f"answers-{self.index + 1}-of-{self.count}.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run came to; what does not depend on its speed is in the answers file."""

    asked: int  # now: those that the file had are not among them
    unreadable: dict[str, str]  # by key: why an image or video could not be read
    seconds: float  # of windows in which nothing was compiled
    items: int  # asked in these windows
    compiling: float  # seconds of the other windows


def windows(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions that belong together: `size` of one kind, the shorter ones first; or of a video.

    Shards are made of them.
    """

    def kind(question: Question) -> int:
        return 2 if question.video is not None else int(question.image is not None)

    for number in range(2):
        own = [question for question in questions if kind(question) == number]
        own.sort(key=lambda question: len(question.text))  # stable: the same in every run
        for start in range(0, len(own), size):
            yield own[start : start + size]
    about: dict[Any, list[Question]] = {}
    for question in questions:
        if kind(question) == 2:
            video = question.video if isinstance(question.video, Path) else id(question.video)
            about.setdefault((question.image, video), []).append(question)
    yield from about.values()


def about_a_video(window: Sequence[Question]) -> bool:
    return window[0].video is not None


class Sheet:
    """The answers of some questions in `file`, which may hold some already."""

    def __init__(
        self, benchmark: Benchmark, questions: Sequence[Question], file: Path, model_id: str
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._benchmark, self._questions, self._model_id = benchmark, questions, model_id
        self._journal = Journal(file, lambda line: True)
        self.done = set(join(benchmark, questions, self._journal.lines).answers)  # keys, at first
        self.asked = 0
        self._unreadable: dict[str, str] = {}

    def write(self, question: Question, answer: Answer | str) -> None:
        """An answer; or why there is none, which is reported, and tried again by the next run."""
        if isinstance(answer, str):
            self._unreadable[question.key] = answer
            return
        self.asked += 1
        self._journal.append(
            line_of(
                question,
                answer.text,
                answer_id=_answer_id(self._benchmark, question),
                model_id=self._model_id,
                cut=answer.finish != "stop",
            )
        )

    def end(self, **speed: Any) -> Asked:
        """What the run came to, with the answers in the order that official scorers expect."""
        place = {question.key: number for number, question in enumerate(self._questions)}
        self._journal.sort(
            lambda line: place.get(str((line.get("metadata") or {}).get("key")), len(place))
        )
        return Asked(asked=self.asked, unreadable=self._unreadable, **speed)


def _answer_id(benchmark: Benchmark, question: Question) -> str:
    """Short and unique as LLaVA's, but the same in every run."""
    digest = hashlib.sha256(f"{benchmark.name}\0{question.key}".encode()).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode()
