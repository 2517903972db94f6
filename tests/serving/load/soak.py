"""Thousands of requests of all kinds, a quarter of whose clients leave: what is left of them?

    python -m tests.serving.load.soak MODEL [--requests N] [--warm-up N] [--growth PERCENT]

warm-up --> taken before --requests, 16 at a time--> taken after; the same, or status 1
"""

import argparse
import dataclasses
import json
import random
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.serving.load.kinds import Kinds
from tests.serving.load.process import Served, Taken, check, model_folder, served

AT_A_TIME = 16
LEAVE = 0.25  # of all clients
SPARE = 2  # threads and descriptors: one that is just ending is no leak


def main() -> None:
    parser = argparse.ArgumentParser(description="requests of all kinds; what is left of them?")
    parser.add_argument("model", metavar="MODEL", help="a folder, or tiny")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument("--growth", type=float, default=1.0, help="percent of memory; default: 1")
    args = parser.parse_args()
    with served(model_folder(args.model), "--slots", "8") as server:
        soak(server, args.requests, args.warm_up, args.growth)


def soak(server: Served, requests: int, warm_up: int, growth: float) -> None:
    """Prints figures; ends the command where a bound is not kept."""
    compiled = server.taken().compilations
    Soak(server, seed=1).run(warm_up)
    answer, before, began = server.greedy(), _settled(server, None), time.monotonic()
    told = Soak(server, seed=2).run(requests)
    seconds = time.monotonic() - began
    after = _settled(server, before)
    print(f"{requests} requests after {warm_up}, {AT_A_TIME} at a time, in {seconds:.0f} s: "
          + ", ".join(f"{name} {count}" for name, count in sorted(told.items())))  # fmt: skip
    for name, value in dataclasses.asdict(before).items():
        print(f"{name}: {value:,} before, {getattr(after, name):,} after")
    grown = 100 * (after.resident / before.resident - 1)
    print(f"memory grew by {grown:.2f} %; compiled after ready: {after.compilations - compiled}")
    _hold(before, after, grown, growth, compiled)
    check(
        not {"5", "?"} & {name[0] for name in told}, f"there were answers of 5xx, or none: {told}"
    )
    check("Traceback" not in server.stderr, "the server's stderr has a traceback")
    check(server.greedy() == answer, "a greedy question has another answer afterwards")


def _hold(before: Taken, after: Taken, grown: float, growth: float, compiled: int) -> None:
    for name in ("slots", "running", "waiting"):
        value = getattr(after, name)
        check(value == 0, f"{name} is {value} when all are answered; it should be 0")
    for name in ("threads", "files"):
        old, new = getattr(before, name), getattr(after, name)
        check(new <= old + SPARE, f"{name} went from {old} to {new}")
    check(grown < growth, f"memory grew by {grown:.2f} %; it should be under {growth:g} %")
    check(after.compilations == compiled, "something was compiled after the server was ready")


def _settled(server: Served, before: Taken | None) -> Taken:
    """Once nobody is answered, and threads that end have ended."""
    server.idle()
    end = time.monotonic() + 5
    while True:
        taken = server.taken()
        old = before or taken
        if (taken.threads <= old.threads and taken.files <= old.files) or time.monotonic() > end:
            return taken
        time.sleep(0.1)


class Soak:
    """The clients; what they are told is counted by status."""

    def __init__(self, server: Served, seed: int):
        self._port, self._kinds, self._rng = server.client.port, Kinds(seed), random.Random(seed)

    def run(self, count: int) -> Counter[str]:
        names = self._kinds.names
        asked = (
            (*self._kinds.one(names[n % len(names)]), random.Random(self._rng.random()))
            for n in range(count)
        )
        told: Counter[str] = Counter()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            # Some at a time: bodies are large.
            while batch := [one for one, _ in zip(asked, range(500), strict=False)]:
                told.update(pool.map(lambda one: self._ask(*one), batch))
        return told

    def _ask(self, path: str, body: Any, rng: random.Random) -> str:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = _http(path, raw)
        with socket.create_connection(("127.0.0.1", self._port), timeout=120) as client:
            if rng.random() < LEAVE:
                _leave(client, sent, rng)
                return "left"
            client.sendall(sent)
            return _status(client)


def _http(path: str, body: bytes) -> bytes:
    head = (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    return head.encode() + body


def _leave(client: socket.socket, sent: bytes, rng: random.Random) -> None:
    """Leaves in the middle of what is sent, while it waits, or while it reads."""
    moment = rng.randrange(3)
    client.sendall(sent[: rng.randrange(len(sent))] if moment == 0 else sent)
    time.sleep(rng.random() ** 3 * 0.3)
    if moment == 2:
        client.recv(rng.randrange(1, 2000))
    if rng.random() < 0.5:  # at once, with what is on its way thrown away
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _status(client: socket.socket) -> str:
    """Of a whole answer; "?" where there is none."""
    found = bytearray()
    while chunk := client.recv(65536):
        found += chunk
    head, _, body = bytes(found).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 ") or not body:
        return "?"
    if b"text/event-stream" in head and b"data: [DONE]" not in body:
        return "?, a stream without its end"
    return head[9:12].decode()


if __name__ == "__main__":
    main()
