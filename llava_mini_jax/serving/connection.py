"""Connections whose clients must not take for ever: heads and bodies arrive in time, or it closes.

    bytes --h11--> head complete? --no--> the head's clock     body complete? --no--> the body's
                                                |                                        |
                                                '-------- run down: the connection ends -'

uvicorn waits for both without end, and says in its own words what is no HTTP.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.stream import dumps

HEAD_SECONDS = 20.0
SPARE = 5.0  # seconds that a body has more than the application gives it, which answers first


def protocol(body_seconds: float) -> type[H11Protocol]:
    """The protocol class of a server whose bodies may take `body_seconds` to arrive."""

    class Timed(H11Protocol):
        _clock: asyncio.TimerHandle | None = None
        _for: str = ""  # what the clock runs for

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.access_log = False  # it has queries; guard.py writes lines
            self._wait_for("head", HEAD_SECONDS)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_for("")
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            state = self.conn.their_state
            if state is h11.SEND_BODY:
                self._wait_for("body", body_seconds + SPARE)
            elif state is h11.IDLE and self.conn.trailing_data[0]:
                self._wait_for("head", HEAD_SECONDS)
            else:
                self._wait_for("")

        def _wait_for(self, what: str, seconds: float = 0.0) -> None:
            if what == self._for:  # the clock goes on: a byte now and then does not turn it back
                return
            if self._clock is not None:
                self._clock.cancel()
            self._for = what
            end = self.transport.abort
            self._clock = self.loop.call_later(seconds, end) if what else None

        def send_400_response(self, msg: str) -> None:
            body = dumps(ApiError(400, "this is not a readable HTTP request").body())
            headers = [("content-type", "application/json"), ("connection", "close")]
            events = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Timed
