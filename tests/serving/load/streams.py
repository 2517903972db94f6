"""Clients that read streams, and note when each piece of text came: on one loop, with little work.

bodies --ask, all at once--> Stream: text, times of its pieces
"""

import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.serving.load.kinds import CHAT

HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


@dataclass
class Stream:
    began: float
    times: list[float]  # in which text came
    chunks: list[bytes]  # JSON
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]

    @property
    def text(self) -> str:
        found = (json.loads(chunk)["choices"] for chunk in self.chunks)
        return "".join(c["delta"].get("content", "") for choices in found for c in choices)


class _Reader(asyncio.Protocol):
    """Notes when text came; what it says is looked at when all is over."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.found, self.times = bytearray(), list[float]()

    def data_received(self, data: bytes) -> None:
        # One time for what came together: a client sees it at once.
        if b'"delta":{"content":"' in data:
            self.times.append(time.perf_counter())
        self.found += data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(exc)


async def ask(port: int, body: dict[str, Any]) -> Stream:
    """A chat as a stream; ValueError for one that does not end as it should."""
    options = {"include_usage": True}
    raw = json.dumps({"temperature": 0, **body, "stream": True, "stream_options": options}).encode()
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(_Reader, "127.0.0.1", port)
    began = time.perf_counter()
    transport.write(f"{HEAD.format(CHAT)}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    await reader.ended
    lines = bytes(reader.found).split(b"\n")
    chunks = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    if not chunks or chunks.pop() != b"[DONE]" or not reader.times:
        raise ValueError(f"a stream did not end as it should: {bytes(reader.found[-300:])!r}")
    tokens = json.loads(chunks[-1])["usage"]["completion_tokens"]
    return Stream(began, reader.times, chunks, tokens)


async def together(port: int, bodies: Iterable[dict[str, Any]], at_a_time: int) -> list[Stream]:
    """The streams of all, `at_a_time` clients that each ask for the next when one has ended."""
    following, streams = iter(bodies), []

    async def client() -> None:
        for body in following:
            streams.append(await ask(port, body))

    await asyncio.gather(*(client() for _ in range(at_a_time)))
    return streams


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def milliseconds(values: Sequence[float]) -> str:
    """P50 and P99."""
    return f"{1000 * percentile(values, 50):.1f} and {1000 * percentile(values, 99):.1f} ms"
