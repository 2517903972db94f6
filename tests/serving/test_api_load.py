"""Many clients: a full queue, clients that leave, silence, probes under load, figures."""

import asyncio
import concurrent.futures
import gc
import json
import random
import re
import socket
import threading
import time
import weakref
from typing import Any, cast

import pytest

from llava_mini_jax.inference.ticket import Piece, Ticket
from llava_mini_jax.serving import lifecycle
from llava_mini_jax.serving.app import application
from llava_mini_jax.serving.generation import Generation, Post
from tests.serving import fake
from tests.serving.running import Client, joined, running, wait_until

CHAT = "/v1/chat/completions"


def opened(client: Client, **fields: Any) -> socket.socket:
    """A connection with a chat that is asked and not read."""
    asked = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}
    body = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def long_one(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 200, "ignore_eos": True, **fields}


def figure(client: Client, name: str, **labels: str) -> float:
    """The sum over all series of a metric with these labels."""
    found = 0.0
    for line in client.send("/metrics").body.decode().splitlines():
        head, _, value = line.rpartition(" ")
        known = re.match(r"[\w:]+", head)
        if known and known[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
            found += float(value)
    return found


def test_a_full_queue_is_429_until_there_is_room() -> None:
    service = fake.service(fake.FakeWorker(slots=2, pace=0.01), max_queued=3)
    with running(service) as client:
        held = [opened(client, **long_one(n=2)), opened(client, **long_one())]
        wait_until(lambda: service.admission.held == 3)
        reply = client.chat("one more")
        assert (reply.status, reply.error["type"]) == (429, "RateLimitError")
        assert 1 <= int(reply.headers["retry-after"]) <= 120
        never = client.chat("too many", n=4)
        assert (never.status, never.error["param"]) == (400, "n")
        assert figure(client, "llava_mini:admission_rejections_total", reason="queue_full") == 1
        for connection in held:
            connection.close()
        wait_until(lambda: service.admission.held == 0)
        assert client.chat("now").status == 200


def test_time_to_come_back_follows_the_queue() -> None:
    service = fake.service(max_queued=1000)
    admission = service.admission
    for _ in range(100):
        admission.served(2.0)
    admission.enter(40)
    assert admission.retry_after() == 20  # 40 answers of 2 s on 4 slots
    admission.enter(900)
    assert admission.retry_after() == 120


def test_who_waits_too_long_is_told_so_and_never_begun() -> None:
    worker = fake.FakeWorker(slots=1, pace=0.02)
    with running(fake.service(worker, queue_timeout=0.3)) as client:
        first = opened(client, **long_one(max_tokens=50))
        wait_until(lambda: worker.begun)
        began = time.monotonic()
        reply = client.chat("late one")
        assert reply.status == 429 and time.monotonic() - began > 0.2
        assert "waited 0.3 s" in reply.error["message"] and "retry-after" in reply.headers
        # The one that is being answered takes longer than that, and goes on.
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        first.close()
        wait_until(lambda: not worker.counts().running)
        assert not any("late one" in prompt for prompt in worker.begun)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots(stream: bool, n: int) -> None:
    worker = fake.FakeWorker(pace=0.05)
    service = fake.service(worker)
    with running(service) as client:
        connection = opened(client, **long_one(stream=stream, n=n))
        wait_until(lambda: worker.counts().running == n)
        if stream:
            connection.recv(1000)
        connection.close()
        wait_until(lambda: service.admission.held == 0)
        before = worker.steps
        wait_until(lambda: worker.counts().running == 0)
        assert worker.steps - before <= 2
        aborted = figure(client, "llava_mini:request_success_total", finished_reason="abort")
        assert aborted == n


def test_queued_work_of_a_client_that_left_never_begins() -> None:
    worker, reader = fake.FakeWorker(slots=1, pace=0.01), fake.FakeReader(seconds=0.3)
    with running(fake.service(worker, reader, media_threads=1)) as client:
        picture = {"type": "image_url", "image_url": {"url": "data:,"}}
        first = opened(client, **long_one())
        wait_until(lambda: worker.begun)
        words = [{"role": "user", "content": "queued one"}]
        queued = opened(client, messages=words)
        wait_until(lambda: worker.counts().waiting == 1)
        queued.close()
        shown = [{"role": "user", "content": [picture, "picture"]}]
        pictures = [opened(client, messages=shown) for _ in range(3)]
        wait_until(lambda: client.send("/load").json["server_load"] == 4)
        for one in pictures:
            one.close()
        first.close()
        wait_until(lambda: client.send("/load").json["server_load"] == 0)
        time.sleep(0.5)
        assert len(reader.read_parts) <= 1 and len(worker.begun) == 1


def test_silence_is_broken_by_comments_and_a_late_failure_is_an_event() -> None:
    worker = fake.FakeWorker(slots=1, pace=0.03)
    with running(fake.service(worker, keep_alive=0.1)) as client:
        first = opened(client, **long_one(max_tokens=20))
        wait_until(lambda: worker.begun)
        reply = client.chat("hello", stream=True)
        assert reply.body.startswith(b": keep-alive\n\n") and reply.status == 200
        assert reply.body.endswith(b"data: [DONE]\n\n")
        first.close()
        slow = fake.FakeReader(seconds=0.35)
    with running(fake.service(reader=slow, keep_alive=0.1)) as client:
        content = [{"type": "image_url", "image_url": {"url": "data:,"}}, "fail at once"]
        asked = {"messages": [{"role": "user", "content": content}], "stream": True}
        reply = client.send(CHAT, asked)
        assert reply.status == 200 and reply.body.count(b": keep-alive") >= 2
        assert b'data: {"error":{' in reply.body and reply.body.endswith(b"data: [DONE]\n\n")


def test_clients_that_come_and_go_leave_nothing() -> None:
    worker = fake.FakeWorker(pace=0.002)
    service = fake.service(worker, max_queued=64)
    chosen = random.Random(3)
    with running(service) as client:
        client.chat("warm")

        def one(number: int) -> None:
            fields = long_one(max_tokens=number % 30 + 1, stream=number % 2 == 0, n=number % 3 + 1)
            if number % 3 == 0:
                connection = opened(client, **fields)
                time.sleep(0.01 * chosen.random())
                connection.close()
            else:
                assert client.chat("hello", **fields).status in (200, 429)

        before = threading.active_count()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(300)))
        wait_until(lambda: service.admission.held == 0 and worker.counts().running == 0)
        assert not service.replies and threading.active_count() <= before + 4
        assert figure(client, "llava_mini:num_requests_waiting") == 0


def test_figures_are_what_clients_see() -> None:
    with running(fake.service(fake.FakeWorker(pace=0.01), vllm_metrics=True)) as client:
        seen = []
        for _ in range(10):
            began = time.perf_counter()
            connection = opened(client, stream=True, max_tokens=6)
            while b"data: " not in connection.recv(65536):
                pass
            seen.append(time.perf_counter() - began)
            while b"[DONE]" not in connection.recv(65536):
                pass
            connection.close()
        client.chat("hello", max_tokens=3, n=2)
        name = "llava_mini:time_to_first_token_seconds"
        wait_until(lambda: figure(client, f"{name}_count") == 12)
        text = client.send("/metrics")
        assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
        usage = client.chat("hello", max_tokens=6).json["usage"]
        assert figure(client, "llava_mini:generation_tokens_total") == 10 * 6 + 2 * 3 + 6
        assert figure(client, "llava_mini:prompt_tokens_total") == 12 * usage["prompt_tokens"]
        succeeded = figure(client, "llava_mini:request_success_total", finished_reason="length")
        assert succeeded == figure(client, "vllm:request_success_total") == 13
        assert figure(client, "llava_mini:inter_token_latency_seconds_count") >= 10 * 4
        # The server's mean, of all but the last three, beside the clients'.
        for _ in range(1):
            mean = figure(client, f"{name}_sum") / figure(client, f"{name}_count")
            assert abs(mean - sum(seen) / len(seen)) < 0.02
        templates = {
            line.split('handler="')[1].split('"')[0]
            for line in text.body.decode().splitlines()
            if line.startswith("http_requests_total")
        }
        assert templates <= {CHAT, "/metrics"}


def test_labels_stay_few(client: Client) -> None:
    for number in range(20):
        client.send(f"/nothing/{number}")
        client.send(f"/v1/models/{number}")
        client.send("/health", method=f"WORD{number}")
    lines = client.send("/metrics").body.decode().splitlines()
    series = [line for line in lines if line.startswith("http_requests_total")]
    assert not any("WORD" in line or "/nothing" in line for line in series)
    assert any('handler="/v1/models/{name:path}"' in line for line in series)
    assert len(series) < 40


def test_a_stream_beside_others_is_whole(client: Client) -> None:
    alone = {text: client.said(text) for text in map(str, range(12))}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda text: joined(client.streamed(text)), alone))
    assert together == list(alone.values())


def test_a_piece_that_comes_with_the_end_does_not_keep_it_going() -> None:
    class Silent(fake.FakeWorker):
        def submit(self, request: Any, listener: Any) -> Ticket:
            return Ticket(request, listener)

    async def ended() -> bool:
        request: Any = None
        generation = Generation(cast(Any, Silent()), [request], Post())
        told = generation.told(pause=9, deadline=time.monotonic() + 9, late=RuntimeError)
        task = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0.01)
        generation.tickets[0].listener(Piece("a", [5]))
        await asyncio.sleep(0)  # it is in the queue, and not yet taken
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        return task.cancelled()

    assert asyncio.run(ended())


def test_requests_are_let_go_without_a_search_for_garbage() -> None:
    """Their media may be files of a temporary folder."""

    class Noting(fake.FakeWorker):
        def submit(self, request: Any, listener: Any) -> Ticket:
            asked.append(weakref.ref(request))
            return super().submit(request, listener)

    asked: list[Any] = []
    with running(fake.service(Noting())) as client:
        gc.collect()
        gc.disable()
        try:
            client.streamed("one")
            client.said("two")
            client.said("the last one, which the worker still has")
            wait_until(lambda: asked[0]() is None and asked[1]() is None)
        finally:
            gc.enable()


def test_the_loop_is_woken_once_for_what_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def told() -> tuple[list[Any], list[int]]:
        loop, queue, post = asyncio.get_running_loop(), asyncio.Queue(), Post()
        wakes, wake, seen = [], loop.call_soon_threadsafe, []
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *what: (wakes.append(len(seen)), wake(*what))
        )
        for first in (0, 3):
            for number in range(first, first + 3):
                post.send(loop, queue, number)
            for _ in range(3):
                seen.append(await asyncio.wait_for(queue.get(), 5))
        return seen, wakes

    assert asyncio.run(told()) == ([0, 1, 2, 3, 4, 5], [0, 3])


def test_what_is_there_when_the_engine_is_ready_is_no_garbage_to_look_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = fake.service()
    wait_until(lambda: service.worker.state == "ready")
    server = lifecycle.Server(lifecycle.config(application(service), service), service)
    frozen: list[str] = []
    monkeypatch.setattr(lifecycle.gc, "freeze", lambda: frozen.append("frozen"))
    for counter in (1, 2):
        asyncio.run(server.on_tick(counter))
    assert frozen == ["frozen"]
    service.worker.stop()


def test_a_server_that_compiles_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing before the programs are counted, then a line every ten seconds."""
    service = fake.service()
    wait_until(lambda: service.worker.state == "ready")
    server = lifecycle.Server(lifecycle.config(application(service), service), service)
    service.worker.state, now = "starting", time.monotonic()
    ticks = [(4.0, 0, 0), (11.0, 0, 0), (12.0, 3, 12), (20.0, 5, 12), (23.2, 9, 12)]
    with caplog.at_level("INFO", "llava_mini_jax"):
        for counter, (seconds, *compiling) in enumerate(ticks):
            monkeypatch.setattr(lifecycle.time, "monotonic", lambda at=now + seconds: at)
            service.worker.compiling = tuple(compiling)
            asyncio.run(server.on_tick(counter + 1))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "compiling: 3 of 12 programs after 12 s, about 36 s left",
        "compiling: 9 of 12 programs after 23 s, about 8 s left",
    ]
    monkeypatch.undo()
    service.worker.stop()
