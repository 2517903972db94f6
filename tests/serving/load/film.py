"""A film of hours asked about while chats stream: their gaps, and its answer beside `ask`'s.

    python -m tests.serving.load.film MODEL [--hours H] [--chats N]

chats alone --> gaps;  beside the film, until it is answered --> gaps: P99 at most 2 times
`llava-mini ask --video` --> the same answer
"""

import argparse
import asyncio
import base64
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.serving.load.process import ENV, Served, check, fail, model_folder, served
from tests.serving.load.streams import Stream, ask, milliseconds, percentile
from tests.tiny_model import write_video

QUESTION, ANSWER = "What happens in this film?", 32  # tokens
TOKENS = 160  # of a chat's answer, which then asks again
ALONE_SECONDS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description="a film of hours beside chats")
    parser.add_argument("model", metavar="MODEL", help="a folder, or tiny:16384")
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--lengths", default="256,16384", help="of slots; default: 256,16384")
    args = parser.parse_args()
    model = model_folder(args.model)
    with tempfile.TemporaryDirectory(prefix="film-") as place:
        path = write_video(Path(place) / "film.mp4", round(3600 * args.hours), rate=1)
        with served(model, "--slots", str(args.chats), "--lengths", args.lengths) as server:
            answer = asyncio.run(beside(server, path, args.chats))
        expected = asked(model, path)
    check(answer == expected, f"the server said {answer!r}, `ask` {expected!r}")
    print(f"answer equal to `llava-mini ask --video`'s: {answer!r:.60}")


async def beside(server: Served, path: Path, chats: int) -> str:
    """Prints figures, ends the command where a bound is not kept; the film's answer."""
    alone = await _gaps(server, chats, asyncio.sleep(ALONE_SECONDS))
    film = asyncio.ensure_future(ask(server.client.port, _about(path)))
    with_film = await _gaps(server, chats, film)
    stream, seconds = film.result(), film.result().times[0] - film.result().began
    print(f"first token of the film's answer after {seconds:.1f} s")
    print(f"gaps of {chats} chats alone: {milliseconds(alone)}, {len(alone)} of them (P50, P99)")
    print(f"gaps beside the film: {milliseconds(with_film)}, {len(with_film)} of them")
    ratio = percentile(with_film, 99) / percentile(alone, 99)
    print(f"P99 beside the film: {ratio:.2f} times alone; longest gaps: {1000 * max(alone):.0f} ms"
          f" alone, {1000 * max(with_film):.0f} ms beside")  # fmt: skip
    check(ratio <= 2, f"the P99 of gaps is {ratio:.2f} times that of chats alone; 2 is allowed")
    return stream.text


async def _gaps(server: Served, chats: int, until: Any) -> list[float]:
    """Gaps of chats that go on asking until something has ended."""
    ended = asyncio.ensure_future(until)
    began, streams = time.perf_counter(), []

    async def chat(number: int) -> None:
        while not ended.done():
            text = f"Tell me about number {number}."
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS}
            streams.append(await ask(server.client.port, body | {"ignore_eos": True}))

    await asyncio.gather(ended, *map(chat, range(chats)))
    return [gap for stream in streams for gap in _within(stream, began)]


def _within(stream: Stream, began: float) -> list[float]:
    return [] if stream.began < began else stream.gaps


def _about(path: Path) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": ANSWER}


def asked(model: str, path: Path) -> str:
    """The answer of `llava-mini ask`."""
    command = [sys.executable, "-m", "llava_mini_jax", "ask", model, "--video", str(path),
               "--max-new-tokens", str(ANSWER), QUESTION]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True)
    if done.returncode:
        fail(f"`llava-mini ask` ended with status {done.returncode}: {done.stderr[-500:]}")
    return done.stdout.removesuffix("\n")


if __name__ == "__main__":
    main()
