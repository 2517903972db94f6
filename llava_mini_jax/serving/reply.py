"""One request being answered: made ready, submitted, told; whole, or as events while it grows.

prepare (threads) --Requests--> Generation --Pieces--> Said of each choice --whole--> JSON
                                                  '--chunk by chunk--> EventStream
the client is gone --> all of it is cancelled
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_mini_jax.inference.ticket import Piece, Request
from llava_mini_jax.serving import errors
from llava_mini_jax.serving.admission import Place
from llava_mini_jax.serving.fields import Fields
from llava_mini_jax.serving.generation import Generation, Told
from llava_mini_jax.serving.service import Service
from llava_mini_jax.serving.shapes import ChatShape, CompletionShape, Said
from llava_mini_jax.serving.stream import EventStream, dumps
from llava_mini_jax.serving.usage import timings, usage

LOG = logging.getLogger(__name__)
Prepare = Callable[[], Awaitable[Sequence[Request]]]


class Reply:
    """An ASGI application that answers once. It holds its Place until it is over."""

    def __init__(
        self,
        service: Service,
        fields: Fields,
        shape: ChatShape | CompletionShape,
        prepare: Prepare,
        place: Place,
        arrived: float,  # time.perf_counter
    ):
        self._service, self._fields, self._shape = service, fields, shape
        self._prepare, self._place, self._arrived = prepare, place, arrived
        self._deadline = time.monotonic() + service.options.queue_timeout
        self._said: list[Said] = []
        self._generation: Generation | None = None
        self._preparing: asyncio.Future[Any] | None = None
        self._failure: Exception | None = None
        self._told_at: dict[int, float] = {}  # of each choice's last output
        service.replies.add(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._stream if self._fields.stream else self._whole
        work = asyncio.ensure_future(answer(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        reason = "abort"
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                reason = "error"
                work.result()
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work})
            self._end(reason)

    def fail(self, error: Exception) -> None:
        """Ends it with an error, wherever it is."""
        self._failure = error
        if self._generation is not None:
            self._generation.fail(error)
        elif self._preparing is not None:
            self._preparing.cancel()

    def _end(self, reason: str) -> None:
        metrics, generation = self._service.metrics, self._generation
        self._service.replies.discard(self)
        self._place.leave()
        if generation is None:
            metrics.count("request_success", reason)
            return
        generation.close()
        for ticket in generation.tickets[:: self._fields.n]:
            metrics.asked(ticket.usage)
        for ticket, said in zip(generation.tickets, self._said, strict=True):
            metrics.answered(ticket.usage, said.count, self._arrived, said.finish or reason)
            if ticket.usage.begun is not None:
                last = ticket.usage.last or time.perf_counter()
                self._service.admission.served(last - ticket.usage.begun)

    # ------------------------------------------------------------------------------ what is told

    async def _events(self) -> AsyncIterator[Told | None]:
        """Pieces as they come; None for every while in which nothing came."""
        pause = self._service.options.keep_alive
        # Let go of: it holds what the client has sent, which may be large.
        prepare, self._prepare = self._prepare, _nothing
        self._preparing = asyncio.ensure_future(prepare())
        del prepare
        try:
            while not (await asyncio.wait({self._preparing}, timeout=pause))[0]:
                if time.monotonic() >= self._deadline:
                    raise self._service.late()
                yield None
            if self._failure is not None:
                raise self._failure
            requests = self._preparing.result()
        finally:
            self._preparing.cancel()
            self._preparing = None  # its result holds films' files
        stops = (*self._fields.stop, *self._fields.stop_token_ids)
        self._said = [Said(stops) for _ in requests]
        self._generation = Generation(self._service.worker, requests, self._service.post)
        told = self._generation.told(pause=pause, deadline=self._deadline, late=self._service.late)
        async for each in told:
            if each is not None:
                self._note(*each)
            yield each

    def _note(self, index: int, piece: Piece) -> None:
        self._said[index].add(piece)
        if piece.count:
            now = time.perf_counter()
            if (before := self._told_at.get(index)) is not None:
                self._service.metrics.observe("inter_token_latency_seconds", now - before)
            self._told_at[index] = now

    def _usage(self) -> dict[str, Any]:
        assert self._generation is not None
        return usage(self._generation.tickets, self._said, self._fields.n)

    def _metrics(self) -> dict[str, Any]:
        assert self._generation is not None
        if not self._fields.include_metrics:
            return {}
        first = self._generation.tickets[0].usage
        return {"metrics": timings(first, self._said[0].count, self._arrived)}

    # ------------------------------------------------------------------------------ how it is told

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self._events():
            pass
        body = {**self._shape.whole(self._said), "usage": self._usage(), **self._metrics()}
        await Response(dumps(body), media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send)
        try:
            async for told in self._events():
                if told is None:
                    await stream.comment()
                    continue
                await stream.events(*self._chunks(*told))
            await stream.events(*self._behind())
        except Exception as error:
            if not stream.begun:  # still a plain error, with a status
                raise
            said = errors.of(error)
            if said.status == 500:
                LOG.exception("a stream failed")
            await stream.events(said.body())
            self._failure = error
        await stream.done()

    def _chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        said, shape, chunks = self._said[index], self._shape, []
        if not said.begun and (first := shape.first(index)) is not None:
            chunks.append(first)
        said.begun = True
        if piece.text or piece.tokens:
            chunks.append(shape.piece(index, piece.text, piece.tokens))
        if said.finish is not None:
            chunks.append(shape.last(index, said))
        return [self._with_usage(chunk) for chunk in chunks]

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        options = self._fields.stream_options
        if options is not None and options.continuous_usage_stats:
            return {**chunk, "usage": self._usage()}
        if options is not None and options.include_usage:
            return {**chunk, "usage": None}
        return chunk

    def _behind(self) -> list[dict[str, Any]]:
        """The chunk of usage, if it is asked for; and of metrics, which may come alone."""
        options, more = self._fields.stream_options, self._metrics()
        if options is not None and options.include_usage:
            more["usage"] = self._usage()
        return [{**self._shape.behind(), **more}] if more else []


async def _nothing() -> Sequence[Request]:
    return ()


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
