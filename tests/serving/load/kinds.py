"""Requests of every kind that a client may send, for the soak.

seed --> Kinds --one--> (path, body): a few images and films, over and over, so that what the
                        server remembers of them is complete after a while
"""

import base64
import random
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests import tiny_model
from tests.serving.test_media import saved

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PICTURES, FILMS = 8, 3


def data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Kinds:
    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)
        pictures = [saved(Image.fromarray(tiny_model.picture(n))) for n in range(PICTURES)]
        self._pictures = [data(content, "image/png") for content in pictures]
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "film.mp4"
            films = [
                tiny_model.write_video(path, seconds).read_bytes()
                for seconds in range(2, 2 + FILMS)
            ]
        self._films = [data(content, "video/mp4") for content in films]
        self._broken = [data(content[: len(content) // 2], "video/mp4") for content in films]
        self._frames = [
            "data:video/jpeg;base64,"
            + ",".join(url.rpartition(",")[2] for url in self._pictures[start : start + 3])
            for start in range(FILMS)
        ]
        self.names = ("chat", "picture", "pictures", "frames", "mp4", "uuid", "choices",
                      "logprobs", "stop", "completion", "completions", "bad")  # fmt: skip

    def one(self, name: str | None = None) -> tuple[str, Any]:
        """A request of one of `names`; bytes of a body are sent as they are."""
        rng = self._rng
        name = name or rng.choice(self.names)
        if name == "bad":
            return self._bad()
        common: dict[str, Any] = {"max_tokens": rng.randrange(1, 33), "seed": rng.randrange(2**32),
                                  "temperature": rng.choice((0, 0, 0.8))}  # fmt: skip
        if rng.random() < 0.5:
            common |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}}
        common |= {"ignore_eos": True} if rng.random() < 0.3 else {}
        if name.startswith("completion"):
            texts: Any = ["one, two,", "a b c"] if name == "completions" else "one, two,"
            return TEXT, {"prompt": texts, **common}
        more: dict[str, dict[str, Any]] = {
            "choices": {"n": rng.randrange(2, 5), "temperature": 1},
            "logprobs": {"logprobs": True, "top_logprobs": rng.randrange(6)},
            "stop": {"stop": rng.sample("abcdefghij", 3)},
        }
        content = self._media(name)
        text = {"type": "text", "text": rng.choice(("What is this?", "And now? Say it in short."))}
        messages = [{"role": "user", "content": [*content, text]}]
        return CHAT, {"messages": messages, **common, **more.get(name, {})}

    def _media(self, name: str) -> list[dict[str, Any]]:
        rng = self._rng
        if name in ("frames", "mp4"):
            url = rng.choice(self._frames if name == "frames" else self._films)
            return [{"type": "video_url", "video_url": {"url": url}}]
        if name == "uuid":  # often before it is known: then it is 404
            number = rng.randrange(PICTURES)
            known = {"type": "image_url", "uuid": f"image {number}"}
            sent = {"image_url": {"url": self._pictures[number]}} if rng.random() < 0.5 else {}
            return [{**known, "image_url": None, **sent}]
        counts = {"picture": 1, "pictures": rng.randrange(2, 5), "logprobs": rng.randrange(2)}
        chosen = [rng.choice(self._pictures) for _ in range(counts.get(name, 0))]
        return [{"type": "image_url", "image_url": {"url": url}} for url in chosen]

    def _bad(self) -> tuple[str, Any]:
        rng = self._rng
        broken = {"type": "video_url", "video_url": {"url": rng.choice(self._broken)}}
        unread = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        asked: list[Any] = [
            b"{",
            b"[" * 5000,
            {},
            {"messages": []},
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": -1},
            {"messages": [{"role": "user", "content": "x"}], "model": "another"},
            {"messages": [{"role": "user", "content": "x " * 20_000}]},
            {"messages": [{"role": "user", "content": [unread]}]},
            {"messages": [{"role": "user", "content": [broken]}]},
        ]
        return CHAT, rng.choice(asked)
