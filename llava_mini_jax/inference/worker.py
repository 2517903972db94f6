"""A thread that drives an engine: requests come from other threads, and answers go back to them.

    submit (any thread) --queue--> step, step, ... (this thread) --listeners--> whoever asked
                            between two steps: `between`

What goes wrong in a step ends the requests that were in it, not the thread.
"""

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from llava_mini_jax import sharding
from llava_mini_jax.compilation import compiled
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.engine import Engine
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.inference.ticket import Piece, Request, Ticket
from llava_mini_jax.inference.warm_up import WarmUp, of_engine

T = TypeVar("T")

MOST_FAILURES = 3  # without an answer between them: then the device is taken to be dead


class StoppedError(Exception):
    """The request ends because the worker does."""


@dataclass(frozen=True)
class Counts:
    """What an engine has to do at this moment, and what it has done."""

    running: int  # requests with a slot
    waiting: int  # without one
    slots: int
    slots_in_use: int
    kv_usage: float  # of the slots' positions, those that hold something; 0 to 1
    compilations: int  # of this process
    steps: int
    media: int  # images and films that are known
    media_bytes: int  # that they take


class Worker:
    """An engine of its own thread; `start` it, `submit` to it from any thread, `stop` it."""

    def __init__(
        self,
        model: Model,
        lanes: Sequence[LaneSize],
        *,
        budget: Budget | None = None,
        steps: int = 2,
    ):
        self.model, self.lanes = model, list(lanes)
        compiled()  # counts from now on
        self.state = "starting"  # "ready", "dead"
        self.compiling = (0, 0)  # programs that are compiled, of how many; (0, 0): not yet counted
        self.error: Exception | None = None  # why it is dead
        self.engine = Engine(model, lanes, budget=budget, steps=steps)
        self._steps = steps
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._new = 0  # requests in the inbox
        self._lock = threading.Lock()
        self._mesh = sharding.current_mesh()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------- from any thread

    def start(self) -> None:
        """Compiles all programs, then serves; `state` says how far it is."""
        self._thread.start()

    def submit(self, request: Request, listener: Callable[[Piece | Exception], None]) -> Ticket:
        """Takes a request. The listener hears StoppedError once the worker has ended."""
        ticket = Ticket(request, listener)
        with self._lock:
            self._new += 1
        self._inbox.put(ticket)
        if self.state == "dead":
            self._refuse_all()
        return ticket

    def between(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` on the engine's thread between two steps."""
        future: Future[T] = Future()
        self._inbox.put((work, future))
        if self.state == "dead":
            self._refuse_all()
        return future

    def counts(self) -> Counts:
        engine = self.engine
        with self._lock:
            new = self._new
        slots, used, capacity = engine.slots()
        known = engine.gallery.used()
        return Counts(
            running=engine.running,
            waiting=engine.waiting + new,
            slots=slots,
            slots_in_use=engine.running,
            kv_usage=used / capacity,
            compilations=compiled(),
            steps=engine.steps,
            media=known.pop("media"),
            media_bytes=sum(known.values()),
        )

    def stop(self) -> None:
        """Ends the thread; open requests hear StoppedError."""
        self._inbox.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # ------------------------------------------------------------------------- on its own thread

    def _run(self) -> None:
        try:
            with sharding.use_mesh(self._mesh):
                self._compile()
                self.state = "ready"
                self._serve()
        except Exception as error:
            self.error = error
            traceback.print_exc(file=sys.stderr)
        finally:
            self.state = "dead"
            self.engine.fail_all(StoppedError("the engine has stopped"))
            self._refuse_all()

    def _compile(self) -> None:
        texts = [size for size in self.model.buckets.lengths if size <= self.engine.text_bucket]
        compiling = WarmUp(
            lambda call: of_engine(self.model, call, self.lanes, texts=texts, steps=self._steps),
            always=True,
        )
        compiling.wait(self._watch)

    def _watch(self, done: int, total: int) -> None:
        self.compiling = done, total

    def _serve(self) -> None:
        busy, failures, answered = False, 0, 0
        while True:
            item = self._next(wait=not busy)
            while item is not _NOTHING:
                if item is None:
                    return
                self._take(item)
                item = self._next(wait=False)
            try:
                busy = self.engine.step()
            except Exception as error:
                # A program has failed, and may have taken the lanes' arrays with it.
                traceback.print_exc(file=sys.stderr)
                failures = 1 if self.engine.answered > answered else failures + 1
                answered = self.engine.answered
                self.engine.fail_all(error)
                if failures == MOST_FAILURES:
                    raise

    def _next(self, *, wait: bool) -> Any:
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return _NOTHING

    def _take(self, item: Any) -> None:
        if isinstance(item, Ticket):
            try:
                self.engine.take(item)
            except Exception as error:
                item.listener(error)
            with self._lock:
                self._new -= 1
            return
        work, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    def _refuse_all(self) -> None:
        while True:
            try:
                item = self._inbox.get(block=False)
            except queue.Empty:
                return
            if isinstance(item, Ticket):
                with self._lock:
                    self._new -= 1
                item.listener(StoppedError("the engine has stopped"))
            elif item is not None:
                item[1].cancel()


_NOTHING = object()


def default_lanes(model: Model, slots: int, lengths: Sequence[int] | None = None) -> list[LaneSize]:
    """Lanes for a server: `slots` of a usual length, fewer of longer ones, one for the longest.

    Without `lengths`, 1024 positions, 4096, and so on up to the model's own. Raises InputError for
    lengths that mean nothing.
    """
    most = model.bundle.model.llm.max_positions
    if slots < 1:
        raise InputError(f"the slots are {slots}; give 1 or more")
    if lengths is None:
        lengths = [length for length in (1024, 4096) if length < most]
        lengths = [*lengths, most]
    for length in lengths:
        if not 2 <= length <= most:
            raise InputError(
                f"a slot has {length} positions; give 2 to {most}, those of the language model"
            )
    ordered = sorted(set(lengths))
    counts = [max(1, slots * ordered[0] // length) for length in ordered]
    return [LaneSize(count, length) for count, length in zip(counts, ordered, strict=True)]
