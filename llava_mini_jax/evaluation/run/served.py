"""A server asked a benchmark's questions: the answers file is that of a local run.

    Question --picture as PNG, film as a file or frames--> POST /v1/chat/completions --> sheet.py
         '-- further ones about a film: its `uuid`, and nothing of it again

What an image looks like is decided here (orientation, colours), what a model makes of it there; so
both runs read the same pixels. As many questions as `concurrency` says are under way at a time; the
file is written in the order of the local run. Neither a device nor a model's folder is needed.
"""

import base64
import http.client
import io
import json
import random
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.video import FrameSampling, read_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.judge.http import (
    Endpoint,
    exchange,
    read_key,
    retry_after,
    said,
    text_of,
)
from llava_mini_jax.evaluation.run.sheet import Asked, Shard, Sheet, about_a_video, windows
from llava_mini_jax.inference.answer import Answer

_WINDOW = 32  # questions of a window, of which shards are made: a local run's
_RETRIED = (0, 408, 409, 425, 429)  # and 5xx; 0 is silence
_REFUSED = (400, 413, 422)  # of one question; another one may be answered
_FPS = 1.0


def endpoint(url: str, key_variable: str | None, concurrency: int, timeout: float) -> Endpoint:
    """The server at http://HOST:PORT, or at .../v1."""
    base = url.rstrip("/")
    with suppress(ValueError):
        if not urllib.parse.urlsplit(base).path:
            base += "/v1"
    return Endpoint(
        base_url=base,
        key_variable=key_variable,
        concurrency=concurrency,
        timeout_s=timeout,
        owner="the server",
    )


class _ForgottenError(Exception):
    """A uuid that the server does not know any more."""


class Server:
    """An endpoint with its key. Its methods raise InputError where it cannot be asked."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self._key = endpoint, read_key(endpoint)
        self.stopped = threading.Event()  # nothing is sent any more

    def model(self) -> str:
        """The name of the first of its models."""
        data = self._sent(None, "/models")[1]
        try:
            return str(data["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"{self.endpoint.base_url}/models names no model; give --model NAME"
            ) from None

    def answer(self, body: dict[str, Any]) -> Answer | str:
        """What it answers, or why it refuses this question. _ForgottenError for a uuid."""
        status, data = self._sent(json.dumps(body).encode(), "/chat/completions")
        if status == 400 and _param(data) == "input_tokens" and "max_completion_tokens" in body:
            # The answer has no room for so many tokens: whatever room there is will do.
            return self.answer({k: v for k, v in body.items() if k != "max_completion_tokens"})
        if status == 404 and _param(data) == "uuid":
            raise _ForgottenError
        if status in _REFUSED:
            return f"the server refuses it ({said(status, data)})"
        text = text_of(data) if status == 200 else None
        if text is None:
            raise InputError(
                f"{self.endpoint.base_url} gives no chat completions ({said(status, data)}); give"
                " the --server and the --model of one that does"
            )
        finish = data["choices"][0].get("finish_reason")
        tokens = (data.get("usage") or {}).get("completion_tokens", 0)
        return Answer(text, tokens, "stop" if finish == "stop" else "length")

    def _sent(self, content: bytes | None, path: str) -> tuple[int, Any]:
        """(status, response) of a good request, or of one that is refused for good."""
        for number in range(self.endpoint.tries):
            headers: Any = {}
            try:
                status, headers, data = exchange(self.endpoint, content, self._key, path)
            except (OSError, http.client.HTTPException) as error:
                status, data = 0, {"error": {"message": type(error).__name__}}
            if status == 200 or status in (404, *_REFUSED):
                return status, data
            if status not in _RETRIED and status < 500:
                break
            if self.stopped.is_set():
                break
            wait = self.endpoint.first_wait_s * 2**number * random.uniform(0.75, 1.25)
            wait = min(max(wait, retry_after(headers)), self.endpoint.longest_wait_s)
            self.stopped.wait(wait)
        raise InputError(
            f"{self.endpoint.base_url} does not answer ({said(status, data)}); the same command"
            " resumes from here"
        )


def _param(data: Any) -> Any:
    error = data.get("error") if isinstance(data, dict) else None
    return error.get("param") if isinstance(error, dict) else None


def ask(
    server: Server,
    model: str,
    model_id: str,
    benchmark: Benchmark,
    questions: Sequence[Question],
    folder: Path,
    *,
    shard: Shard,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Asked:
    """`runner.ask` by a server's `model`. Raises InputError where the server does not answer; what
    it has answered is in the file."""
    sheet = Sheet(benchmark, questions, folder / shard.file, model_id)
    began, failure = time.perf_counter(), None
    with ThreadPoolExecutor(server.endpoint.concurrency) as pool:
        running = []
        for window in list(windows(questions, _WINDOW))[shard.index :: shard.count]:
            left = [question for question in window if question.key not in sheet.done]
            progress(len(window) - len(left))
            # A film's questions come one after the other: the first brings it.
            for own in [left] if about_a_video(window) else [[question] for question in left]:
                fields = {"model": model, "max_completion_tokens": max_new_tokens}
                running.append(pool.submit(_answers, server, fields, benchmark, own))
        try:
            for future in as_completed(running):
                try:
                    found = future.result()
                except InputError as error:
                    failure = failure or error
                    # Those that wait come back at once. Not cancelled: of a future that a pool's
                    # shutdown cancels `as_completed` never hears.
                    server.stopped.set()
                    continue
                for question, answer in found:
                    sheet.write(question, answer)
                progress(len(found))
        except BaseException:
            server.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failure is not None:
        raise failure
    seconds = time.perf_counter() - began
    return sheet.end(seconds=seconds, items=sheet.asked, compiling=0.0)


def _answers(
    server: Server, fields: dict[str, Any], benchmark: Benchmark, questions: Sequence[Question]
) -> list[tuple[Question, Answer | str]]:
    """Answers to questions about the same image or film, which is sent with the first."""
    if not questions or server.stopped.is_set():
        return []
    try:
        parts = _parts(questions[0], benchmark)
    except InputError as error:
        return [(question, str(error)) for question in questions]
    if len(questions) > 1:
        parts = [part | {"uuid": uuid.uuid4().hex} for part in parts]
    if isinstance(questions[0].video, Path) and questions[0].video.is_file():
        fields = fields | _sampling(benchmark)
    named = [part | {part["type"]: None} for part in parts]
    found: list[tuple[Question, Answer | str]] = []
    for question in questions:
        # A refusal may have been of the film itself: then the server does not know it.
        known = any(isinstance(answer, Answer) for _, answer in found)
        try:
            answer = server.answer(_body(fields, named if known else parts, question.text))
        except _ForgottenError:
            answer = server.answer(_body(fields, parts, question.text))
        found.append((question, answer))
    return found


def _body(fields: dict[str, Any], parts: Sequence[dict[str, Any]], text: str) -> dict[str, Any]:
    if parts and text[:1].isspace():
        # Servers put a line's end behind an image, but not where the text brings white space.
        text = "\n" + text
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {**fields, "messages": [{"role": "user", "content": content}], "temperature": 0}


def _parts(question: Question, benchmark: Benchmark) -> list[dict[str, Any]]:
    """A question's image, and its film. Raises InputError for what cannot be read."""
    parts = []
    if question.image is not None:
        parts.append(_part("image_url", "image/png", [_png(load_image(question.image))]))
    film = question.video
    if isinstance(film, Path) and not film.is_dir():
        try:
            parts.append(_part("video_url", "video/mp4", [film.read_bytes()]))
        except OSError as error:
            raise InputError(f"Cannot open the video {film}: {error}; check the path.") from error
    elif film is not None:
        frames: Iterable[np.ndarray] = (
            film if isinstance(film, np.ndarray) else _frames(film, benchmark)
        )
        # The type that servers know for frames; what each of them is its own bytes say.
        parts.append(_part("video_url", "video/jpeg", [_png(Image.fromarray(f)) for f in frames]))
    return parts


def _frames(folder: Path, benchmark: Benchmark) -> Iterable[np.ndarray]:
    return read_video(folder, FrameSampling(fps=_FPS, max_frames=benchmark.max_frames))


def _sampling(benchmark: Benchmark) -> dict[str, Any]:
    """How frames of a file are chosen, where it is not the server's own way: one a second."""
    if benchmark.max_frames is None:
        return {}
    return {"media_io_kwargs": {"video": {"fps": _FPS, "num_frames": benchmark.max_frames}}}


def _part(kind: str, media_type: str, contents: Sequence[bytes]) -> dict[str, Any]:
    letters = ",".join(base64.b64encode(content).decode() for content in contents)
    return {"type": kind, kind: {"url": f"data:{media_type};base64,{letters}"}}


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
