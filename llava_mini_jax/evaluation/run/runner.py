"""A model asked a benchmark's questions: every answer is kept at once, nothing is asked twice.

    questions --by kind and length--> windows --read by threads--> Examples --a batch at a time--.
        |  '-----------by video-----> windows -opened by threads-> Sessions --one by one--.      |
        |                                                                                 v      v
        '---- those that answers.jsonl has already are left out of their window ----> answers.jsonl

The windows depend on the questions alone. So a run that was killed anywhere and started again asks
the same things in the same company, and its file is that of a run that was not. Processes, or
machines, take every n-th window each (`Shard`) and write a file each; scoring reads them all.

A video is read and seen once for all of its questions, each a conversation of its own (session.py),
and its frames are never in memory together.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run.sheet import Asked, Shard, Sheet, about_a_video, windows
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model, compiled_programs
from llava_mini_jax.inference.prompt_template import written_as
from llava_mini_jax.inference.request import refuse_videos, sampling_for
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.inference.warm_up import WarmUp, of_requests

_WINDOW = 4  # batches whose images are read together: as many wait while as many are answered
_VIDEOS_AHEAD = 4  # videos whose first frames are read while another one is asked about


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
    compiling: Callable[[int, int], None] = lambda done, total: None,
) -> Asked:
    """Answers in `folder`/answers.jsonl (of a shard, answers-I-of-N.jsonl).

    `progress` hears how many more questions are done, `compiling` how many programs of how many,
    before the first of them. A question whose image cannot be read
    gets no answer, is reported, and is tried again by the next run.
    """
    if any(question.video is not None for question in questions):
        refuse_videos(model.bundle)  # once, and not as the reason of every question
    sheet = Sheet(benchmark, questions, folder / shard.file, model_id)
    settings = Settings(max_new_tokens=max_new_tokens)
    items = 0
    seconds = spent_compiling = 0.0
    chosen = list(windows(questions, _WINDOW * batch_size))[shard.index :: shard.count]
    answer = functools.partial(_in_batches, model, settings, batch_size, compiling)
    reading = _read_ahead(model, benchmark, chosen, sheet.done, settings, answer)
    for window, answers in reading:
        began, programs, before = time.perf_counter(), compiled_programs(), sheet.asked
        left = len(window)
        for question, answer in answers:
            sheet.write(question, answer)
            progress(1)
            left -= 1
        progress(left)
        took = time.perf_counter() - began
        if compiled_programs() == programs:
            seconds, items = seconds + took, items + sheet.asked - before
        else:
            spent_compiling += took
    return sheet.end(seconds=seconds, items=items, compiling=spent_compiling)


Answers = Iterator[tuple[Question, Answer | str]]  # or why there is none


def _read_ahead(
    model: Model,
    benchmark: Benchmark,
    chosen: Sequence[list[Question]],
    done: set[str],
    settings: Settings,
    in_batches: Callable[..., Answers],
) -> Iterator[tuple[list[Question], Answers]]:
    """Each window with the answers of its questions that are not done; the next ones are read."""
    sampling = sampling_for(model.bundle, max_frames=benchmark.max_frames)
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor()
        stack.callback(pool.shutdown, cancel_futures=True)

        def start(window: list[Question]) -> Callable[[], Answers]:
            left = [question for question in window if question.key not in done]
            if not left:
                return lambda: iter(())
            if about_a_video(window):
                session = pool.submit(_open, model, left, sampling, settings)
                return lambda: _one_by_one(session.result(), left)
            found = [pool.submit(_prepare, model, benchmark, q, sampling) for q in left]
            prepared = map(Future.result, found)
            return lambda: in_batches(left, list(prepared))

        waiting: deque[tuple[list[Question], Callable[[], Answers]]] = deque()
        for window in chosen:
            waiting.append((window, start(window)))
            if len(waiting) > (_VIDEOS_AHEAD if about_a_video(window) else 1):
                current, answers = waiting.popleft()
                yield current, answers()
        while waiting:
            current, answers = waiting.popleft()
            yield current, answers()


def _prepare(
    model: Model, benchmark: Benchmark, question: Question, sampling: FrameSampling
) -> Example | str:
    try:
        pictures = model.read_pictures(question.image, question.video, sampling)
        return model.request(question.text, pictures, f"{benchmark.name}, {question.key}")
    except InputError as error:
        return str(error)


def _in_batches(
    model: Model,
    settings: Settings,
    batch_size: int,
    compiling: Callable[[int, int], None],
    questions: Sequence[Question],
    prepared: Sequence[Example | str],
) -> Answers:
    examples = [example for example in prepared if isinstance(example, Example)]
    if not compiled_programs():
        programs = WarmUp(lambda call: of_requests(model, call, examples, settings, batch_size))
        programs.wait(compiling)
    answers = iter(model.answer_requests(examples, settings, batch_size=batch_size))
    for question, example in zip(questions, prepared, strict=True):
        yield question, example if isinstance(example, str) else next(answers)


def _open(
    model: Model, questions: Sequence[Question], sampling: FrameSampling, settings: Settings
) -> Session | str:
    """A session that shows the video of the questions, or why it cannot be read."""
    # What a video leaves behind is of use for a second question only.
    budget = Budget() if len(questions) > 1 else Budget(host=0)
    image, video = questions[0].image, questions[0].video
    try:
        session = Session(model, settings, budget=budget)
        if image is not None:
            session.show_image(image)
        if video is not None:
            session.show_video(video, sampling)
    except InputError as error:
        return str(error)
    return session


def _one_by_one(session: Session | str, questions: Sequence[Question]) -> Answers:
    for question in questions:
        try:
            answer = session if isinstance(session, str) else session.answer_alone(question.text)
        except InputError as error:
            answer = str(error)
        yield question, answer


def settings_of(model: Model, name: str, benchmark: Benchmark, **given: Any) -> dict[str, Any]:
    """What the answers of the model in folder `name` depend on, for settings_file.check_same."""
    return {
        "folder": str(Path(name).resolve()),
        "weights": _weights(name),
        "benchmark": benchmark.name,
        "model": {
            **dataclasses.asdict(model.bundle),
            "written_as": written_as(model.bundle, model.tokenizer),
        },
        "weights_dtype": model.weights_dtype,
        "frames": dataclasses.asdict(sampling_for(model.bundle, max_frames=benchmark.max_frames)),
        **given,
    }


def of_date(model: Model, settings: dict[str, Any]) -> Model:
    """`model` on the day of these settings: a run that goes on another day asks as it began."""
    now, prompt = model.bundle.prompt, (settings.get("model") or {}).get("prompt") or {}
    if not now.date or not prompt.get("date"):
        return model
    bundle = dataclasses.replace(
        model.bundle, prompt=dataclasses.replace(now, date=str(prompt["date"]))
    )
    return dataclasses.replace(model, bundle=bundle)


def _weights(name: str) -> str:
    """Tells weights apart without reading gigabytes: their files' names, sizes and first bytes."""
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()[:16]
