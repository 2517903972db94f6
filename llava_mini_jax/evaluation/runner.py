"""A model asked a benchmark's questions: every answer is kept at once, nothing is asked twice.

    questions --by kind and length--> windows --read by threads--> Examples --model--> answers.jsonl
        '--- those that answers.jsonl has already are left out of their window ---'

The windows depend on the questions alone. So a run that was killed anywhere and started again asks
the same things in the same company, and its file is that of a run that was not. Processes, or
machines, take every n-th window each (`Shard`) and write a file each; scoring reads them all.
"""

import base64
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax.data.examples import Example
from llava_mini_jax.data.video import FrameSampling
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.answers import join, line_of
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model, compiled_programs
from llava_mini_jax.inference.request import sampling_for
from llava_mini_jax.journal import Journal

_WINDOW = 4  # batches whose pictures are read together: as many wait while as many are answered


class Shard(NamedTuple):
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @property
    def file(self) -> str:
        one = self.count == 1
        return "answers.jsonl" if one else f"answers-{self.index + 1}-of-{self.count}.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run came to; what does not depend on its speed is in the answers file."""

    asked: int  # now: those that the file had are not among them
    unreadable: dict[str, str]  # by key: why a picture or video could not be read
    seconds: float  # of windows in which nothing was compiled
    items: int  # asked in these windows
    compiling: float  # seconds of the other windows


def ask(
    model: Model,
    model_id: str,
    benchmark: Benchmark,
    questions: Sequence[Question],
    folder: Path,
    *,
    shard: Shard,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Run:
    """Answers in `folder`/answers.jsonl (of a shard, answers-I-of-N.jsonl).

    `progress` is told how many more questions are done. A question whose picture cannot be read
    gets no answer, is reported, and is tried again by the next run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / shard.file, lambda line: True)
    known = join(benchmark, questions, journal.lines)
    settings = Settings(max_new_tokens=max_new_tokens)
    unreadable: dict[str, str] = {}
    asked = items = 0
    seconds = compiling = 0.0
    windows = list(_windows(questions, batch_size))[shard.index :: shard.count]
    for window, prepared in _read_ahead(model, benchmark, windows, set(known.answers)):
        progress(len(window) - len(prepared))
        ready = [(question, e) for question, e in prepared if isinstance(e, Example)]
        unreadable |= {question.key: e for question, e in prepared if isinstance(e, str)}
        if ready:
            began, programs = time.perf_counter(), compiled_programs()
            answers = model.answer_requests([e for _, e in ready], settings, batch_size=batch_size)
            for (question, _), answer in zip(ready, answers, strict=True):
                journal.append(
                    line_of(
                        question,
                        answer.text,
                        answer_id=_answer_id(benchmark, question),
                        model_id=model_id,
                        cut=answer.finish != "stop",
                    )
                )
            took = time.perf_counter() - began
            if compiled_programs() == programs:
                seconds, items = seconds + took, items + len(ready)
            else:
                compiling += took
        asked += len(ready)
        progress(len(prepared))
    # Official scorers expect the order of the questions.
    place = {question.key: number for number, question in enumerate(questions)}
    journal.sort(lambda line: place.get(str((line.get("metadata") or {}).get("key")), len(place)))
    return Run(
        asked=asked, unreadable=unreadable, seconds=seconds, items=items, compiling=compiling
    )


def files(folder: Path) -> list[Path]:
    """The answers files of a folder: one, or those of its shards in their order."""
    return sorted(folder.glob("answers*.jsonl"), key=lambda path: (len(path.name), path.name))


def _windows(questions: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """Questions that are read together; of one kind, the shorter ones first."""

    def kind(question: Question) -> int:
        return 2 if question.video is not None else int(question.image is not None)

    for number in range(3):
        own = [question for question in questions if kind(question) == number]
        own.sort(key=lambda question: len(question.text))  # stable: the same in every run
        # A video may be hundreds of frames: one batch of them at a time.
        size = batch_size if number == 2 else _WINDOW * batch_size
        for start in range(0, len(own), size):
            yield own[start : start + size]


Prepared = list[tuple[Question, Example | str]]  # or why it cannot be read


def _read_ahead(
    model: Model, benchmark: Benchmark, windows: Sequence[list[Question]], done: set[str]
) -> Iterator[tuple[list[Question], Prepared]]:
    """Each window with the examples of its questions that are not done; the next one is read."""
    sampling = sampling_for(model.bundle, max_frames=benchmark.max_frames)
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor()
        stack.callback(pool.shutdown, cancel_futures=True)

        def start(window: list[Question]) -> list[tuple[Question, Future[Example | str]]]:
            left = [question for question in window if question.key not in done]
            return [(q, pool.submit(_prepare, model, benchmark, q, sampling)) for q in left]

        reading = map(start, windows)
        following = next(reading, [])
        for window in windows:
            current, following = following, next(reading, [])
            yield window, [(question, future.result()) for question, future in current]


def _prepare(
    model: Model, benchmark: Benchmark, question: Question, sampling: FrameSampling
) -> Example | str:
    try:
        pictures = model.read_pictures(question.image, question.video, sampling)
        return model.request(question.text, pictures, f"{benchmark.name}, {question.key}")
    except InputError as error:
        return str(error)


def _answer_id(benchmark: Benchmark, question: Question) -> str:
    """Short and unique as LLaVA's, but the same in every run."""
    digest = hashlib.sha256(f"{benchmark.name}\0{question.key}".encode()).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode()


def settings_of(model: Model, benchmark: Benchmark, **given: Any) -> dict[str, Any]:
    """What the answers depend on, for the results and for telling two runs apart."""
    return {
        "benchmark": benchmark.name,
        "model": dataclasses.asdict(model.bundle),
        "frames": dataclasses.asdict(sampling_for(model.bundle, max_frames=benchmark.max_frames)),
        **given,
    }
