"""A server with the real page, heat map and comparison, and scripted answers, for a browser.

/, /page, /look, /compare: serving/page.py in front of a tiny model with random weights
/v1/chat/completions: ANSWER, or what goes wrong where the question says so; bodies are kept
"""

import asyncio
import base64
import dataclasses
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import llava_mini_jax
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.serving import page
from llava_mini_jax.serving.errors import ApiError
from tests import tiny_model

ANSWER = "The small **grey** dog <b>sleeps</b> beside the door."
USAGE = {"prompt_tokens": 46, "completion_tokens": 8, "total_tokens": 54}
METRICS = {
    "time_to_first_token_ms": 48.2,
    "generation_time_ms": 310.0,
    "queue_time_ms": 0.4,
    "mean_itl_ms": 21.7,
    "tokens_per_second": 46.0,
    "vision_ms": 19.3,
    "prefusion_ms": 8.1,
    "frames": 1,
    "frames_recalled": 0,
}


class StandIn:
    """Starts when it is entered; `key` is asked for where it is one."""

    def __init__(self, key: str = "", port: int = 0):
        self.model = llava_mini_jax.load(tiny_model.folder("paper"))
        self.key, self.port, self.known = key, port, set()
        self.asked: list[dict[str, Any]] = []  # bodies of /v1/chat/completions
        self.ended: list[str] = []  # how streams ended: "done", or "left" by the client
        self.thread = ThreadPoolExecutor(1)  # the engine's
        worker: Any = SimpleNamespace(model=self.model, between=self.thread.submit)
        self.app = Starlette(
            routes=[
                Route("/ready", lambda request: Response()),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                *page.routes(worker, self.read, name="llava-mini", body_bytes=2**20),
            ],
            exception_handlers={ApiError: _told},  # type: ignore[arg-type]
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.guard)],
        )

    # ---------------------------------------------------------------------------- requests

    async def guard(self, request: HttpRequest, answer: Any) -> Response:
        free = request.url.path in {"/ready", *page.open_paths()}
        if self.key and not free and request.headers.get("authorization") != f"Bearer {self.key}":
            return await _told(request, ApiError(401, "give a key that this server knows"))
        return await answer(request)

    async def read(self, request: HttpRequest) -> Request:
        """The engine's request of a body whose images are data URLs, or frames of a film."""
        messages = json.loads(await request.body())["messages"]
        parts = [part for message in messages for part in _parts(message)]
        shown = [part for part in parts if part["type"] != "text"]
        pictures = [_pictures(part) for part in shown]
        frames = [self.model.read_pictures(list(some), None).pixels for some in pictures]
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        none = self.model.read_pictures(None, None)
        example = self.model.request("<image>" * len(shown) + question, _with(none, frames))
        media = [Medium(b"", len(some), lambda some=some: iter(some)) for some in frames]
        return Request(example, media, Settings(max_new_tokens=4))

    async def chat(self, request: HttpRequest) -> Response:
        body = json.loads(await request.body())
        self.asked.append(body)
        parts = [part for message in body["messages"] for part in _parts(message)]
        shown = [part for part in parts if part["type"] != "text"]
        recalled = [part for part in shown if part[part["type"]] is None]
        for part in recalled:
            if part["uuid"] not in self.known:
                raise ApiError(404, f"no image is known as {part['uuid']}", param="uuid")
        self.known |= {part["uuid"] for part in shown}
        question = parts[-1]["text"]
        if question == "refuse":
            raise ApiError(400, "the context is full: 300 positions, the model has 256")
        told = dict(usage=USAGE | {"prompt_tokens_details": {"image_tokens": len(shown)}})
        told["metrics"] = METRICS | {"frames": len(shown), "frames_recalled": len(recalled)}
        if recalled:
            told["usage"]["prompt_tokens_details"]["cached_tokens"] = 41
            told["metrics"] |= {"time_to_first_token_ms": 6.3, "vision_ms": 0.0}
        return StreamingResponse(self.stream(question, told), media_type="text/event-stream")

    async def stream(self, question: str, told: dict[str, Any]) -> AsyncIterator[str]:
        left = True
        try:
            yield ": keep-alive\n\n" + _event(choices=[{"delta": {"role": "assistant"}}])
            words = ANSWER.split(" ")
            for number in range(10**6 if question == "endless" else len(words)):
                await asyncio.sleep(0.5 if question == "slow" else 0.03)
                if question == "break" and number == 2:
                    yield _event(error={"message": "the engine has stopped"}) + "data: [DONE]\n\n"
                    return
                if question == "tear" and number == 2:
                    return
                word = words[number % len(words)] + " "
                yield _event(choices=[{"delta": {"content": word}, "finish_reason": None}])
            yield _event(choices=[{"delta": {}, "finish_reason": "stop"}])
            yield _event(choices=[], **told) + "data: [DONE]\n\n"
            left = False
        finally:
            self.ended.append("left" if left else "done")

    # ------------------------------------------------------------------------------ running

    def __enter__(self) -> "StandIn":
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(self.app, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.serving = threading.Thread(target=self.server.run, args=([listening],))
        self.serving.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.serving.join()
        self.thread.shutdown()


async def _told(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status)


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _pictures(part: dict[str, Any]) -> Iterator[Image.Image]:
    for letters in part[part["type"]]["url"].split(",")[1:]:
        yield Image.open(io.BytesIO(base64.b64decode(letters)))


def _with(none: Any, frames: list[np.ndarray]) -> Any:
    return dataclasses.replace(
        none,
        pixels=np.concatenate([none.pixels, *frames]),
        frames=tuple(len(some) for some in frames),
    )
