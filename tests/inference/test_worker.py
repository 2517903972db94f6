"""The engine's thread: nothing is compiled once it is ready, and what fails ends alone."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import InputError, Model, compilation
from llava_mini_jax.inference import slots
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import media_of
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.ticket import Piece, Request
from llava_mini_jax.inference.worker import StoppedError, Worker, default_lanes
from llava_mini_jax.sharding import make_mesh
from tests import tiny, tiny_model
from tests.inference.test_engine import about, asked, film

fast_compilation = tiny.fast_compilation

LANES = [LaneSize(2, 96), LaneSize(1, 256)]
QUESTION = "how many 7s are there?"


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def ready(model):
    worker = Worker(model, LANES)
    assert worker.state == "starting"
    worker.start()
    wait_for(worker, "ready")
    yield worker
    worker.stop()
    assert worker.state == "dead"


def wait_for(worker: Worker, state: str) -> None:
    end = time.monotonic() + 300
    while worker.state != state:
        assert time.monotonic() < end and worker.error is None
        time.sleep(0.01)


class Asked:
    """A request to a worker, from a thread that waits."""

    def __init__(self, worker: Worker, request: Request):
        self.heard: list[Piece | Exception] = []
        self._ended = threading.Event()
        self.ticket = worker.submit(request, self._hear)

    def _hear(self, news: Piece | Exception) -> None:
        self.heard.append(news)
        if isinstance(news, Exception) or news.answer is not None:
            self._ended.set()

    def ids(self) -> list[int]:
        assert self._ended.wait(60)
        assert not isinstance(self.heard[-1], Exception), self.heard[-1]
        return [token for piece in self.heard if isinstance(piece, Piece) for token in piece.ids]

    def error(self) -> Exception:
        assert self._ended.wait(60)
        assert isinstance(self.heard[-1], Exception)
        return self.heard[-1]


def test_nothing_is_compiled_once_it_is_ready(model, ready) -> None:
    """Texts of all buckets, images alone and together, films, follow-ups, all settings."""
    before = compilation.compiled()
    requests = [
        *(asked(model, QUESTION * n, n, b"%d" % n) for n in (1, 2, 4, 7, 11)),
        *(asked(model, QUESTION * n) for n in (1, 3, 5, 9, 12)),
        *(about(model, QUESTION, film(n, b"film%d" % n)) for n in (1, 2, 3, 7, 8, 40, 100)),
        asked(model, QUESTION, 1, b"1", max_new_tokens=200, ignore_end=True),
        asked(model, QUESTION, 9, temperature=1.0, top_k=5, logprobs=20, seed=9),
        asked(model, QUESTION, 9, b"9", min_tokens=4, stop=["7"], stop_ids=[5]),
    ]
    for together in (1, 3, len(requests)):
        for start in range(0, len(requests), together):
            some = [Asked(ready, request) for request in requests[start : start + together]]
            assert all(one.ids() for one in some)
    assert compilation.compiled() == before
    assert ready.compiling[0] == ready.compiling[1] > 0
    counts = ready.counts()
    assert (counts.running, counts.waiting, counts.slots, counts.slots_in_use) == (0, 0, 3, 0)
    assert counts.kv_usage == 0 and counts.media == 13 and counts.media_bytes > 0


def test_many_threads_ask_at_once(model, ready) -> None:
    requests = [asked(model, QUESTION, n, max_new_tokens=5) for n in range(8)]
    expected = [model.answer_requests([r.example], r.settings, batch_size=1)[0] for r in requests]
    found: dict[int, Asked] = {}

    def ask(number: int) -> None:
        found[number] = Asked(ready, requests[number])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in enumerate(expected):
        found[number].ids()
        last = found[number].heard[-1]
        assert isinstance(last, Piece) and last.answer == answer


def test_work_between_steps_runs_on_its_thread(model, ready) -> None:
    assert ready.between(lambda: threading.current_thread().name).result(60) == "engine"

    def broken() -> None:
        raise ValueError("no")

    assert str(ready.between(broken).exception(60)) == "no"
    assert Asked(ready, asked(model, QUESTION)).ids()


def test_a_prompt_that_no_slot_holds_is_told_so(model, ready) -> None:
    long = asked(model, QUESTION, 1)
    ids = np.concatenate([long.example.ids] * 8)
    example = dataclasses.replace(
        long.example, ids=np.abs(ids), fuse=ids > 0, labels=ids, frames=()
    )
    error = Asked(ready, Request(example, (), Settings())).error()
    assert isinstance(error, InputError) and "the engine's longest slot has 255" in str(error)


def test_a_step_that_fails_ends_its_requests_alone(model, ready, monkeypatch, capsys) -> None:
    failing, decode = threading.Event(), slots.decode

    def sometimes(*arguments):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        return decode(*arguments)

    monkeypatch.setattr(slots, "decode", sometimes)
    failing.set()
    assert "no memory" in str(Asked(ready, asked(model, QUESTION)).error())
    assert Asked(ready, asked(model, QUESTION)).ids()
    assert ready.state == "ready" and "no memory" in capsys.readouterr().err


def test_a_device_that_is_dead_is_told(model, monkeypatch, capsys) -> None:
    worker = Worker(model, [LaneSize(1, 64)])
    monkeypatch.setattr(worker, "_compile", lambda: None)
    worker.start()
    wait_for(worker, "ready")

    def dead(*_: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(slots, "decode", dead)
    for _ in range(3):
        error = Asked(worker, asked(model, QUESTION)).error()
        assert "lost" in str(error) or isinstance(error, StoppedError)
    end = time.monotonic() + 60
    while worker.state != "dead" and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.state == "dead" and "lost" in str(worker.error)
    assert isinstance(Asked(worker, asked(model, QUESTION)).error(), StoppedError)
    assert worker.between(lambda: 1).cancelled()
    worker.stop()
    capsys.readouterr()


def test_open_requests_hear_of_the_end(model, monkeypatch) -> None:
    worker = Worker(model, [LaneSize(1, 256)])
    monkeypatch.setattr(worker, "_compile", lambda: None)
    worker.start()
    request = asked(model, QUESTION, max_new_tokens=200, ignore_end=True)
    some = [Asked(worker, request) for _ in range(3)]
    while not some[0].heard:
        time.sleep(0.01)
    worker.stop()
    assert all(isinstance(one.error(), StoppedError) for one in some)


def test_weights_that_lie_split_over_devices_answer_alike(model, monkeypatch) -> None:
    requests = [asked(model, QUESTION, 1), asked(model, QUESTION), about(model, QUESTION, film(3))]
    with jax.set_mesh(make_mesh(tensor=2)):
        split = llava_mini_jax.load(tiny_model.folder("paper"))
        worker = Worker(split, LANES)
    monkeypatch.setattr(worker, "_compile", lambda: None)
    worker.start()
    one = Worker(model, LANES)
    monkeypatch.setattr(one, "_compile", lambda: None)
    one.start()
    assert [Asked(worker, r).ids() for r in requests] == [Asked(one, r).ids() for r in requests]
    worker.stop()
    one.stop()


def test_lanes_of_a_server(model) -> None:
    assert default_lanes(model, 8) == [LaneSize(8, 256)]
    assert default_lanes(model, 8, [256, 64, 64]) == [LaneSize(8, 64), LaneSize(2, 256)]
    assert default_lanes(model, 1, [64, 256]) == [LaneSize(1, 64), LaneSize(1, 256)]
    for count, lengths, words in ((0, None, "slots are 0"), (4, [257], "257"), (4, [1], "give 2")):
        with pytest.raises(InputError, match=words):
            default_lanes(model, count, lengths)


def test_media_of_an_example_are_its_pictures_in_order(model) -> None:
    pictures = [tiny_model.picture(1), tiny_model.picture(2)]
    example = model.request(QUESTION, model.read_pictures(pictures, None))
    first, second = media_of(example)
    np.testing.assert_array_equal([*first.read(), *second.read()], example.pixels)
