"""Malformed bodies over HTTP: nothing but answers and refusals, and nothing of the machine in them.

    python -m tests.serving.load.fuzz MODEL [--bodies N] [--seed N]

fuzz_bodies.py's bodies --POST, 8 at a time--> 2xx or 4xx, else status 1
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from tests.serving import fuzz_bodies
from tests.serving.load.kinds import CHAT
from tests.serving.load.process import Served, check, fail, model_folder, served
from tests.serving.running import Reply
from tests.serving.test_media import MACHINE

AT_A_TIME = 8
# Of answers as a whole: the kinds of errors are names that the protocol has.
ADDRESS = re.compile(rb"0x7f|0x55|Traceback|<[\w.]+ object|/(tmp|proc|home|usr|root|work)/|\.py\b")


def main() -> None:
    parser = argparse.ArgumentParser(description="malformed bodies over HTTP")
    parser.add_argument("model", metavar="MODEL", help="a folder, or tiny")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with served(model_folder(args.model), "--slots", "8") as server:
        fuzz(server, args.bodies, args.seed)


def fuzz(server: Served, count: int, seed: int = 0) -> None:
    """Prints figures; ends the command where a bound is not kept."""
    answer, began = server.greedy(), time.monotonic()
    statuses: Counter[int] = Counter()
    bodies = fuzz_bodies.bodies(count, seed)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while batch := list(islice(bodies, 200)):
            replies = pool.map(lambda body: server.client.send(CHAT, body), batch)
            for body, reply in zip(batch, replies, strict=True):
                _check(body, reply)
                statuses[reply.status] += 1
    seconds = time.monotonic() - began
    print(f"{count} bodies, {AT_A_TIME} at a time, in {seconds:.0f} s; answers by status: "
          + ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items())))  # fmt: skip
    check(server.process.poll() is None, "the server has ended")
    tracebacks = server.stderr.count("Traceback")
    print(f"tracebacks on the server's stderr: {tracebacks}")
    check(not tracebacks, "the server's stderr has a traceback")
    server.idle()
    check(server.greedy() == answer, "a greedy question has another answer afterwards")
    check(bool(statuses[200]) and len(statuses) > 1, "there were answers of one kind alone")


def _check(body: bytes, reply: Reply) -> None:
    shown = body[:300]
    if reply.status // 100 not in (2, 4):
        fail(f"status {reply.status} for the body {shown!r}: {reply.body[:300]!r}")
    if found := ADDRESS.search(reply.body):
        fail(f"an answer has {found[0]!r}, for the body {shown!r}")
    for error in _errors(reply):
        # Where in the client's own text: a line of JSON, not of ours.
        message = re.sub(r"line \d+, column \d+", "", error["message"])
        told = (message, error["param"] or "")
        if any(MACHINE.search(text) for text in told):
            fail(f"an error tells of the machine, {told}, for the body {shown!r}")


def _errors(reply: Reply) -> Iterator[dict[str, Any]]:
    """Of an answer, and of a stream's events."""
    if reply.status != 200:
        yield reply.error
    elif "event-stream" in reply.headers["content-type"]:
        for line in reply.body.split(b"\n"):
            if line.startswith(b'data: {"error"'):
                yield json.loads(line.removeprefix(b"data: "))["error"]


if __name__ == "__main__":
    main()
