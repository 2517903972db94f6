"""A server as a process: signals, exit status, ports; and probes while it is at work."""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from llava_mini_jax.inference.ticket import Medium
from tests.conftest import ROOT
from tests.serving import fake
from tests.serving.load.process import model_folder, served
from tests.serving.running import Client, events, joined, running, wait_until

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def started(
    pace: float, *, delay: float = 0.5, timeout: float = 5.0
) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.fake", *map(str, (port, pace, delay, timeout))],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    client = Client(port)

    def answers() -> bool:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):
            return client.send("/ready").status == 200
        return False

    try:
        wait_until(answers, 60)
        yield process, client
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_answers_end_and_takes_no_new_ones() -> None:
    """Order: not ready; then closed to new work; what runs ends whole; status 0."""
    # Long enough for a machine that is busy with other tests.
    slow = started(pace=0.12, delay=3.0, timeout=60.0)
    with slow as (process, client), concurrent.futures.ThreadPoolExecutor(8) as pool:
        fields = dict(max_tokens=100, ignore_eos=True)
        streams = [pool.submit(client.chat, f"{n}", stream=True, **fields) for n in range(3)]
        whole = pool.submit(client.chat, "whole", **fields)
        wait_until(lambda: client.send("/load").json["server_load"] == 4)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.send("/ready").status == 503)
        assert client.chat("still taken", max_tokens=1).status == 200  # in the delay
        wait_until(lambda: client.chat("no more", max_tokens=1).status == 503)
        refused = client.chat("no more")
        assert refused.error["type"] == "ServiceUnavailableError"
        assert refused.headers["connection"] == "close" and "retry-after" in refused.headers
        assert client.send("/health").status == 200
        for stream in streams:
            chunks = events(stream.result().body)
            assert chunks[-1]["choices"][0]["finish_reason"] == "length" and joined(chunks)
        assert whole.result().json["usage"]["completion_tokens"] == 100
        assert process.wait(60) == 0


def test_what_takes_longer_than_the_timeout_ends_with_an_error() -> None:
    with started(pace=0.1) as (process, client), concurrent.futures.ThreadPoolExecutor(2) as pool:
        fields = dict(max_tokens=200, ignore_eos=True)
        stream = pool.submit(client.chat, "long", stream=True, **fields)
        whole = pool.submit(client.chat, "long", **fields)
        wait_until(lambda: client.send("/load").json["server_load"] == 2)
        process.send_signal(signal.SIGTERM)
        assert events(stream.result().body)[-1]["error"]["code"] == 503
        assert whole.result().error["type"] == "ServiceUnavailableError"
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    slow = started(pace=0.1, timeout=120.0)
    with slow as (process, client), concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(client.chat, "long", stream=True, max_tokens=200, ignore_eos=True)
        wait_until(lambda: client.send("/load").json["server_load"] == 1)
        process.send_signal(number)
        wait_until(lambda: client.send("/ready").status == 503)
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert stream.exception() is not None


def test_an_idle_server_ends_at_once_with_0_at_ctrl_c() -> None:
    with started(pace=0.0) as (process, client):
        keep = socket.create_connection(("127.0.0.1", client.port))  # nobody waits for it
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        keep.close()


class Held(fake.FakeReader):
    """Reads an image when it is let: as if decoding took that long."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.let = threading.Event()

    def read(self, parts: Sequence[Any], video: Any, tenant: str) -> list[Medium]:
        self.begun.release()
        assert self.let.wait(30), "nobody let it: the event loop waits for it"
        return super().read(parts, video, tenant)


def test_probes_answer_while_pictures_are_decoded() -> None:
    """How fast they do is a measurement: python -m tests.serving.load.health."""
    reader = Held()
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = {"messages": [{"role": "user", "content": [picture, "what?"]}]}
    with (
        running(fake.service(reader=reader, media_threads=4)) as client,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):
        replies = [pool.submit(client.send, CHAT, asked) for _ in range(32)]
        for _ in range(4):  # every thread that decodes is at it
            assert reader.begun.acquire(timeout=30)
        for path in ("/health", "/ready", "/load", "/metrics"):
            assert client.send(path).status == 200
        assert not any(reply.done() for reply in replies)
        reader.let.set()
        assert {reply.result().status for reply in replies} == {200}


@pytest.mark.slow  # two servers
def test_a_model_over_two_devices_answers_as_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    answers = []
    for options in ((), ("--mesh", "tensor=2")):
        with served(model_folder("tiny"), "--slots", "4", *options) as server:
            answers.append(server.greedy())
    assert answers[0] == answers[1]
