"""`/health` while many large images are decoded: the event loop must not wait for them.

    python -m tests.serving.load.health MODEL [--pictures N] [--rounds N] [--size 1920x1080]

N clients, each of whom sends the next image when it has an answer --decoded on threads--> answers
a probe after the other, on a socket each --> P50, P99: at most 50 ms
"""

import argparse
import asyncio
import io
import time
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.load.kinds import data
from tests.serving.load.process import Served, check, model_folder, served
from tests.serving.load.streams import milliseconds, percentile, together

MOST = 0.05  # seconds
PAUSE = 0.005  # between two probes
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="/health beside images that are decoded")
    parser.add_argument("model", metavar="MODEL", help="a folder, or tiny")
    parser.add_argument("--pictures", type=int, default=32, help="at once; default: 32")
    parser.add_argument("--rounds", type=int, default=10, help="images of a client")
    parser.add_argument("--size", default="1920x1080", help="default: 1920x1080")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    bodies = [_body(number, (width, height)) for number in range(args.pictures * args.rounds)]
    with served(model_folder(args.model), "--slots", "8") as server:
        alone = asyncio.run(_probes(server, asyncio.sleep(3)))
        asking = together(server.client.port, bodies, args.pictures)
        beside = asyncio.run(_probes(server, asking))
    print(f"/health alone: {milliseconds(alone)}, {len(alone)} probes (P50, P99)")
    print(f"beside {args.pictures} images of {args.size}: {milliseconds(beside)}, "
          f"{len(beside)} probes; the longest {1000 * max(beside):.0f} ms")  # fmt: skip
    found = percentile(beside, 99)
    check(found <= MOST, f"the P99 is {1000 * found:.0f} ms; {1000 * MOST:.0f} ms are wanted")


async def _probes(server: Served, until: Any) -> list[float]:
    """Seconds of probes, one after the other, until something has ended."""
    ended, found = asyncio.ensure_future(until), []
    while not ended.done():
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
        writer.write(PROBE)
        answer = await reader.read()
        found.append(time.perf_counter() - began)
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"/health said {answer[:100]!r}")
        await asyncio.sleep(PAUSE)
    await ended
    return found


def _body(seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """A question about a photograph-like image that nobody has sent before."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    content = [
        {"type": "image_url", "image_url": {"url": data(file.getvalue(), "image/jpeg")}},
        {"type": "text", "text": "What is this?"},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "min_tokens": 8}


if __name__ == "__main__":
    main()
