"""Server-sent events: an answer while it grows.

    event --> "data: {...}" | comment --> ": keep-alive" | done --> "data: [DONE]"

The status goes out with the first of them: until then an error is a plain one.
"""

import json
from typing import Any

from starlette.types import Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; half a character, which no text of UTF-8 holds, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class EventStream:
    def __init__(self, send: Send):
        self._send, self.begun = send, False

    async def events(self, *values: dict[str, Any]) -> None:
        """All in one write."""
        if values:
            await self._write(b"".join(b"data: " + dumps(value) + b"\n\n" for value in values))

    async def comment(self) -> None:
        """What clients skip; proxies cut connections that are silent."""
        await self._write(b": keep-alive\n\n")

    async def done(self) -> None:
        await self._write(b"data: [DONE]\n\n", more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
