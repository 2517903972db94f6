"""A worker that answers by a rule, without weights: what serving/ needs of an engine, and no more.

Run as a program it is a whole server, for tests that send signals:
    python -m tests.serving.fake PORT PACE
"""

import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.answer import AnswerText
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.ticket import Medium, Piece, Request, Ticket, Token
from llava_mini_jax.inference.worker import Counts
from llava_mini_jax.serving.app import application
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.media import MediaReader
from llava_mini_jax.serving.service import Options, Service
from tests import tiny_model
from tests.data import toy_tokenizers

NAME = "fake-llava"
FILLER = ("cat", "dog", "hé", "日本", "😀", "sun", "blue", "two")
DEFECT = "lost <_io.BytesIO object at 0x7f12ab34> in /secret/place/engine.py"


@functools.cache
def model(positions: int = 256) -> Model:
    """One without parameters, that writes prompts with a tokenizer of bytes."""
    tokenizer = toy_tokenizers.make_byte_level()
    bundle = tiny_model.bundle("paper", positions)
    llm = dataclasses.replace(bundle.model.llm, vocab_size=len(tokenizer))
    bundle = dataclasses.replace(
        bundle,
        model=dataclasses.replace(bundle.model, llm=llm),
        eos_ids=(tokenizer.convert_tokens_to_ids("</s>"),),
    )
    params: Any = None
    return Model(params, bundle, tokenizer, bounds.buckets_for(bundle))


class Row:
    """An answer on its way: the rule's tokens, and the text that they become."""

    def __init__(self, ticket: Ticket, model: Model):
        self.ticket, self.model = ticket, model
        settings, request = ticket.request.settings, ticket.request
        image = sum(medium.frames for medium in request.media)
        words = int((request.example.ids >= 0).sum())
        ticket.usage.prompt, ticket.usage.image = words + image, image
        ticket.usage.frames = image
        self.prompt = model.tokenizer.decode(
            request.example.ids[request.example.ids >= 0], skip_special_tokens=True
        )
        left = model.bundle.model.llm.max_positions - words - image
        self.text = AnswerText(
            model.tokenizer,
            (*settings.stop_ids, *(() if settings.ignore_end else model.stop_ids)),
            settings.stop,
            min(settings.max_new_tokens, left),
            "length",
        )
        self.ids = self._ids(request)

    def _ids(self, request: Request) -> list[int]:
        """Greedy: the question said again. Else words that the seed chooses."""
        settings, encode = request.settings, self.model.tokenizer.encode
        question = self.prompt.rpartition("USER: ")[2].removesuffix("ASSISTANT:").strip()
        seen = "".join(f" {medium.key.hex()}" for medium in request.media)
        words = [f"You say: {question}{seen}"]
        if settings.temperature:
            chosen = np.random.default_rng(settings.seed).choice(FILLER, 12)
            words = [" ".join(chosen)]
        ids = encode(words[0], add_special_tokens=False)
        more = encode(" and on", add_special_tokens=False)
        needed = settings.max_new_tokens if settings.ignore_end else settings.min_tokens
        while len(ids) < needed:
            ids += more
        return [*ids, self.model.stop_ids[0]]

    def step(self) -> bool:
        """One token more; False at the end."""
        usage, settings = self.ticket.usage, self.ticket.request.settings
        number = len(self.text.ids)
        if number == 3 and "please fail" in self.prompt:
            raise RuntimeError(DEFECT)
        if number == 0 and "fail at once" in self.prompt:
            raise RuntimeError(DEFECT)
        token = self.ids[min(number, len(self.ids) - 1)]
        piece = self.text.push([token])
        usage.last = time.perf_counter()
        usage.first = usage.first or usage.last
        tokens = []
        if settings.logprobs is not None and len(self.text.ids) > number:
            top = [(token, -0.25), *((token + n, float("-inf")) for n in range(1, 21))]
            tokens = [Token(token, -0.25, top[: settings.logprobs])]
        over = self.text.answer if self.text.finish else None
        self.ticket.listener(Piece(piece, self.text.ids[number:], tokens, over))
        return over is None


class FakeWorker:
    """`pace` seconds a step; a step gives every row a token."""

    def __init__(self, *, slots: int = 4, pace: float = 0.0, positions: int = 256):
        self.model, self.state = model(positions), "starting"
        self.compiling = (0, 0)
        self.lanes = [LaneSize(slots, positions)]
        self.slots, self.pace, self.steps = slots, pace, 0
        self._waiting: list[Ticket] = []
        self._rows: list[Row] = []
        self._lock = threading.Condition()
        self._stopped = False
        self.begun: list[str] = []  # prompts whose work has begun

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request, listener: Callable[[Any], None]) -> Ticket:
        if self.state == "dead":
            raise RuntimeError(DEFECT)
        ticket = Ticket(request, listener)
        with self._lock:
            self._waiting.append(ticket)
            self._lock.notify()
        return ticket

    def between(self, work: Callable[[], Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(work())
        return done

    def counts(self) -> Counts:
        running = len(self._rows)
        return Counts(
            *(running, len(self._waiting), self.slots, running),
            kv_usage=running / self.slots,
            compilations=0,
            steps=self.steps,
            media=0,
            media_bytes=0,
        )

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify()

    def kill(self) -> None:
        self.state = "dead"
        self.stop()

    def _run(self) -> None:
        self.state = "ready"
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._rows or self._waiting or self._stopped)
                if self._stopped:
                    break
                self._enter()
            for row in list(self._rows):
                self._step(row)
            self.steps += 1
            time.sleep(self.pace)
        for ticket in [row.ticket for row in self._rows] + self._waiting:
            ticket.listener(RuntimeError(DEFECT))

    def _enter(self) -> None:
        self._rows = [row for row in self._rows if not row.ticket.cancelled]
        self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
        while self._waiting and len(self._rows) < self.slots:
            row = Row(self._waiting.pop(0), self.model)
            row.ticket.usage.begun = time.perf_counter()
            self.begun.append(row.prompt)
            self._rows.append(row)

    def _step(self, row: Row) -> None:
        try:
            going = row.step()
        except Exception as error:
            row.ticket.listener(error)
            going = False
        if not going:
            self._rows.remove(row)


class FakeReader:
    """Media that nobody decodes: known by their address."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.read_parts: list[Any] = []

    def read(self, parts: Sequence[Any], video: Any, tenant: str) -> list[Medium]:
        time.sleep(self.seconds)
        self.read_parts += parts
        return [
            Medium(f"{part.url}"[-4:].encode(), getattr(video, "num_frames", None) or 1, _nothing)
            if hasattr(part, "detail") is False
            else Medium(f"{part.url}"[-4:].encode(), 1, _nothing)
            for part in parts
        ]


def _nothing() -> Any:
    return iter(())


def service(worker: Any = None, reader: Any = None, **options: Any) -> Service:
    worker = worker or FakeWorker()
    worker.start()
    named = {"names": (NAME,), "fingerprint": "fp_test", **options}
    return Service(worker, reader or FakeReader(), Options(**named))


def main() -> None:
    from llava_mini_jax import signals
    from llava_mini_jax.serving import lifecycle

    def program() -> int:
        bound = lifecycle.listen_on("127.0.0.1", int(sys.argv[1]))
        worker = FakeWorker(pace=float(sys.argv[2]))
        reader = MediaReader(worker.model.bundle, Limits())
        delay, timeout = map(float, sys.argv[3:5])
        made = service(worker, reader, drain_delay=delay, drain_timeout=timeout)
        lifecycle.run(application(made), made, bound)
        return 0

    signals.run(program, "fake: stopped")


if __name__ == "__main__":
    main()
