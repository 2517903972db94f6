"""A server on a thread of the tests, and a client that sends exactly what it is told to."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_mini_jax.serving import lifecycle
from llava_mini_jax.serving.app import application
from llava_mini_jax.serving.service import Service

JSON = {"Content-Type": "application/json"}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, known to have the one shape."""
        assert list(self.json) == ["error"], self.body
        error = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"] and error["message"]
        assert error["code"] == self.status and self.headers["content-type"] == "application/json"
        return error


class Client:
    def __init__(self, port: int, key: str = ""):
        self.port = port
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def send(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> Reply:
        """`body` is sent as JSON, or as it is if it is bytes."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            method = method or ("GET" if body is None else "POST")
            given = {**self.headers, **(JSON if body is not None else {}), **(headers or {})}
            connection.request(method, path, raw, given)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, named, answer.read())

    def chat(self, text: str = "hello", **fields: Any) -> Reply:
        asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return self.send("/v1/chat/completions", asked)

    def said(self, text: str = "hello", **fields: Any) -> str:
        reply = self.chat(text, **fields)
        assert reply.status == 200, reply.body
        return reply.json["choices"][0]["message"]["content"]

    def streamed(self, text: str = "hello", **fields: Any) -> list[dict[str, Any]]:
        return events(self.chat(text, stream=True, **fields).body)


def events(body: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream that ends as it should."""
    blocks = body.decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-3:]
    told = [block for block in blocks[:-2] if not block.startswith(": ")]
    assert all(block.startswith("data: ") for block in told)
    return [json.loads(block.removeprefix("data: ")) for block in told]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)


@contextlib.contextmanager
def running(service: Service, key: str = "") -> Iterator[Client]:
    """A server that is ready, on a thread."""
    bound = lifecycle.listen_on("127.0.0.1", 0)
    app = application(service)
    server = lifecycle.Server(lifecycle.config(app, service), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Client(bound.getsockname()[1], key)
    finally:
        server.should_exit = True
        thread.join(10)
        service.worker.stop()
        service.close()
        assert not thread.is_alive()


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)
