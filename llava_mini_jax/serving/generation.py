"""The answers to one request while the engine makes them, on the event loop.

Requests --submit--> Tickets, whose listener runs on the engine's thread
                        '--call_soon_threadsafe--> queue --told--> (index, Piece), ...
client gone, deadline, end of the server --close, fail--> every ticket cancelled
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from llava_mini_jax.inference.ticket import Piece, Request, Ticket
from llava_mini_jax.inference.worker import Worker

Told = tuple[int, Piece]


class Generation:
    """The tickets of one request. Made and used on the event loop; `close` ends it."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                self.tickets.append(worker.submit(request, self._listener(index)))
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int) -> Callable[[Piece | Exception], None]:
        loop, queue = self._loop, self._queue  # not self: no circle keeps a film until gc comes

        def listen(told: Piece | Exception) -> None:
            # Of a loop that has ended nobody listens any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, (index, told))

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
            waiting = not self.begun
            seconds = min(pause, deadline - time.monotonic()) if waiting else pause
            try:
                # Not wait_for: Python 3.11's forgets that it was cancelled if a piece comes too.
                async with asyncio.timeout(max(seconds, 0.001)):
                    index, told = await self._queue.get()
            except TimeoutError:
                if not self.begun and time.monotonic() >= deadline:
                    raise late() from None
                yield None
                continue
            if isinstance(told, Exception):
                raise told
            open_ones -= told.answer is not None
            yield index, told
