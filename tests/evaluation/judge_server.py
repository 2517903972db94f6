"""A judge's server that does what a test wants, and plans to ask it."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava_mini_jax.evaluation.judge import judging
from llava_mini_jax.evaluation.judge.http import Endpoint
from llava_mini_jax.evaluation.judge.wording import fill, messages

KEY = "sk-test-4f9a0c2e7b"
OURS = {"ask": "Is {answer} right?"}


def completion(text, **more):
    message = {"role": "assistant", "content": text, **more}
    return {"model": "judge-0613", "choices": [{"message": message, "finish_reason": "stop"}]}


class Server(ThreadingHTTPServer):
    """`treat(handler, body, nth)` answers with `handler.give`, or does something else."""

    daemon_threads = True

    def __init__(self, treat):
        super().__init__(("127.0.0.1", 0), Handler)
        self.treat = treat
        self.lock = threading.Lock()
        self.came = Counter()  # by content of the request
        self.paid = Counter()  # likewise: chat completions that were sent
        self.times = []
        self.keys = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that are killed, or have waited long enough, are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client was killed while it sent this
            return
        content = raw.decode()
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            nth = server.came[content]
            server.came[content] += 1
        assert self.path == "/v1/chat/completions"
        self.content = content
        server.treat(self, json.loads(content), nth)

    def do_GET(self):
        assert self.path == "/v1/models"
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
        self.give(200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    def give(self, status, value, **headers):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        if status == 200 and not isinstance(value, bytes) and self.command == "POST":
            with self.server.lock:
                self.server.paid[self.content] += 1
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers; the key is in the environment, no proxy is."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(treat):
            server = stack.enter_context(Server(treat))
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


def endpoint(server, **more):
    settings = {"concurrency": 4, "timeout_s": 5.0, "tries": 3, "first_wait_s": 0.01, **more}
    return Endpoint(base_url=server.url, **settings)


def plan(count, rungs=1, readable=lambda text: True, same=False):
    """`count` asks of `rungs` like requests each."""
    tool = judging.Judge(
        model="gpt-test",
        ours=OURS,
        official={"ask": "0" * 64},
        source="nowhere",
        readable=readable,
        write=lambda *args: [],
        ladders=lambda judged, texts, options: [
            judging.Ladder(
                f"item{n}",
                [{"messages": messages(fill(texts["ask"], answer=str(n * (not same))))}] * rungs,
            )
            for n in range(count)
        ],
    )
    return tool.plan([], {})


def number(body):
    return int(body["messages"][-1]["content"].split()[1])


def texts_of(replies):
    return {key: [reply.text for reply in said] for key, said in replies.by_key.items()}
