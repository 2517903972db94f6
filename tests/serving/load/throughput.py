"""Questions about images a second: many at a time, beside a server that takes one at a time.

    python -m tests.serving.load.throughput MODEL [--rounds N] [--requests N] [--tokens N]

two servers, --slots 16 and --slots 1 --in turns--> medians of rounds: requests, tokens, first
token, gaps
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests import tiny_model
from tests.serving.load.kinds import data
from tests.serving.load.process import Served, check, model_folder, served
from tests.serving.load.streams import Stream, percentile, together
from tests.serving.test_media import saved

CONCURRENCY = (1, 16)
WANTED = 3.0  # times the requests a second


@dataclass
class Round:
    seconds: float
    streams: list[Stream]

    def row(self) -> list[float]:
        gaps = [gap for stream in self.streams for gap in stream.gaps]
        firsts = [stream.first for stream in self.streams]
        times = [1000 * percentile(v, p) for v in (firsts, gaps) for p in (50, 99)]
        tokens = sum(stream.tokens for stream in self.streams)
        return [len(self.streams) / self.seconds, tokens / self.seconds, *times]


def main() -> None:
    parser = argparse.ArgumentParser(description="questions about images a second")
    parser.add_argument("model", metavar="MODEL", help="a folder, or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of a round; default: 64")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer; default: 48")
    parser.add_argument("--wanted", type=float, default=WANTED, help="times; default: 3")
    args = parser.parse_args()
    model = model_folder(args.model)
    with served(model, "--slots", "16") as many, served(model, "--slots", "1") as one:
        measure({"16 slots": many, "1 slot": one}, args)


def measure(servers: dict[str, Served], args: Any) -> None:
    cases = [(name, at) for name in servers for at in CONCURRENCY]
    rounds: dict[tuple[str, int], list[list[float]]] = {case: [] for case in cases}
    for number in range(-1, args.rounds):  # the first one warms up
        for name, at in cases:
            count = args.requests if at > 1 else max(8, args.requests // 4)
            bodies = [_body(1000 * (number + 1) + n, args.tokens) for n in range(count)]
            began = time.perf_counter()
            streams = asyncio.run(together(servers[name].client.port, bodies, at))
            if number >= 0:
                rounds[name, at].append(Round(time.perf_counter() - began, streams).row())
    print(
        "| server, clients | requests/s | tokens/s | first token P50, P99, ms | gap P50, P99, ms |"
    )
    print("|---|---|---|---|---|")
    for name, at in cases:
        row = _medians(rounds[name, at])
        print(f"| {name}, {at} | {row[0]:.2f} | {row[1]:.0f} | {row[2]:.0f}, {row[3]:.0f}"
              f" | {row[4]:.1f}, {row[5]:.1f} |")  # fmt: skip
    many, single = (rounds[name, CONCURRENCY[-1]] for name in servers)
    ratios = [a[0] / b[0] for a, b in zip(many, single, strict=True)]
    ratio = statistics.median(ratios)
    print(f"requests a second at {CONCURRENCY[-1]} clients: {ratio:.2f} times one at a time"
          f" (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")  # fmt: skip
    check(ratio >= args.wanted, f"it is {ratio:.2f} times the requests a second; "
          f"{args.wanted:g} is wanted")  # fmt: skip


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _body(seed: int, tokens: int) -> dict[str, Any]:
    """A question about an image that nobody has sent before."""
    url = data(saved(Image.fromarray(tiny_model.picture(seed, 240, 320))), "image/png")
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "min_tokens": tokens,
    }


if __name__ == "__main__":
    main()
