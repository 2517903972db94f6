"""The answers to one request while the engine makes them, on the event loop.

Requests --submit--> Tickets, whose listener runs on the engine's thread
                        '--Post, a wake for many--> queue --told--> (index, Piece), ...
client gone, deadline, end of the server --close, fail--> every ticket cancelled
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llava_mini_jax.inference.ticket import Piece, Request, Ticket
from llava_mini_jax.inference.worker import Worker

Told = tuple[int, Piece]


class Post:
    """From the engine's thread to the event loop, which is woken once for all that a step tells.

    A wake is a system call, and each lets the loop have Python in the middle of the engine's step.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[asyncio.Queue, Any]] = deque()
        self._woken = False

    def send(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, item: Any) -> None:
        """From any thread; all must name the same loop."""
        self._items.append((queue, item))
        if not self._woken:
            self._woken = True
            # Of a loop that has ended nobody listens any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: who comes from now on wakes it again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


class Generation:
    """The tickets of one request. Made and used on the event loop; `close` ends it."""

    def __init__(self, worker: Worker, requests: Sequence[Request], post: Post):
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._loop, self._post = asyncio.get_running_loop(), post
        self.tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                self.tickets.append(worker.submit(request, self._listener(index)))
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int) -> Callable[[Piece | Exception], None]:
        # Not self: a circle would keep a film's file until gc comes.
        loop, queue, post = self._loop, self._queue, self._post

        def listen(told: Piece | Exception) -> None:
            post.send(loop, queue, (index, told))

        return listen

    @property
    def begun(self) -> bool:
        usages = [ticket.usage for ticket in self.tickets]
        return any(usage.begun is not None or usage.first is not None for usage in usages)

    def fail(self, error: Exception) -> None:
        """Ends it: `told` raises this behind what has been told already."""
        self._queue.put_nowait((0, error))

    def close(self) -> None:
        """Cancels whatever has not ended."""
        for ticket in self.tickets:
            ticket.cancel()

    async def told(
        self, *, pause: float, deadline: float, late: Callable[[], Exception]
    ) -> AsyncIterator[Told | None]:
        """Pieces as they come, until every answer has ended; None where nothing came for `pause`.

        Raises what ended a request, and `late` if by `deadline` (time.monotonic) none of its work
        has begun.
        """
        open_ones = len(self.tickets)
        while open_ones:
            item = await self._next(pause, deadline)
            if item is None:
                if not self.begun and time.monotonic() >= deadline:
                    raise late()
                yield None
                continue
            index, told = item
            if isinstance(told, Exception):
                raise told
            open_ones -= told.answer is not None
            yield index, told

    async def _next(self, pause: float, deadline: float) -> tuple[int, Piece | Exception] | None:
        if not self._queue.empty():
            return self._queue.get_nowait()  # a clock for each would cost more than the rest
        seconds = pause if self.begun else min(pause, deadline - time.monotonic())
        try:
            # Not wait_for: Python 3.11's forgets that it was cancelled if a piece comes too.
            async with asyncio.timeout(max(seconds, 0.001)):
                return await self._queue.get()
        except TimeoutError:
            return None
