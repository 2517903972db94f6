"""Whatever a client sends as an image or a film, it is read, or refused in a sentence."""

import base64
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.serving import fetch
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.media import MediaReader
from llava_mini_jax.serving.parts import ImagePart, VideoOptions, VideoPart
from tests.data.clips import make_video
from tests.serving.test_media import MACHINE, data, picture, reader, saved

PICTURES, URLS, FILMS = 1500, 1200, 40
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with one to four faults."""
    found = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(7)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            del found[at : at + rng.choice((1, 4, 100))]
        elif kind == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 300)))
        elif kind == 3:
            found[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff"))
        elif kind == 4 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 5 and found:  # the head, where sizes are
            found[rng.randrange(min(40, len(found)))] = rng.randrange(256)
        else:
            found[at:at] = found[at : at + 50]
    return bytes(found)


def checked(to: MediaReader, part: Any, options: VideoOptions | None = None) -> bool:
    """Whether it was read; everything but a sentence for the client raises."""
    try:
        for medium in to.read([part], options or VideoOptions(), "t"):
            frames = list(medium.read())
            assert len(frames) == medium.frames and medium.key
            assert all(f.shape == (1, 16, 16, 3) and f.dtype == np.uint8 for f in frames)
        return True
    except ApiError as error:
        assert error.status in (400, 404, 422)
        assert not MACHINE.search(error.message), error.message
        assert len(error.message) < 500 and error.message.isprintable()
        return False


def sources() -> list[bytes]:
    image = picture().resize((60, 50))
    made = [saved(image, kind) for kind in KINDS]
    made += [saved(image.convert(mode)) for mode in ("P", "L", "1", "RGBA", "LA")]
    made += [saved(image.convert("CMYK"), "JPEG"), saved(image, "JPEG", progressive=True)]
    made += [saved(image, kind, save_all=True, append_images=[image]) for kind in ("GIF", "WEBP")]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    return [*made, saved(image, "JPEG", exif=exif), saved(image, "PNG", exif=exif)]


@pytest.mark.parametrize("part", range(5))
def test_damaged_pictures(part):
    to, rng, files = reader(), random.Random(part), sources()
    read = 0
    for _ in range(PICTURES // 5):
        content = damaged(rng.choice(files), rng)
        read += checked(to, ImagePart(data(content)))
    assert 10 < read < PICTURES // 5 - 10  # of both kinds


def strange_url(rng: random.Random, good: str) -> str:
    usual = ("data", ":", rng.choice(("image/png", "video/jpeg")), ";base64", ",", good)
    strange: list[tuple[str, ...]] = [
        ("DATA", " data", "data ", "http", "https", "file", "ftp", "blob", "\0"),
        ("", "::", "://", ":///", ":\\\\"),
        ("", "x" * 500, "image/png;a=b", "\0", "é", "video/jpeg;x", "VIDEO/JPEG"),
        (";BASE64", "", ";base64;", ";base32", "base64", ";base64 "),
        ("", ",,", ";", " ,"),
        (good[:-1], good[1:], "", "=", "A" * 5, "\ud800", "\u202e" + good, good + "\n", ",,,,",
         good.replace("A", "-"), ",".join([good] * 3), "a.example/x.png", "127.0.0.1", "%00",
         "/etc/passwd", "../" * 50),
    ]  # fmt: skip
    return "".join(
        rng.choice(others) if rng.random() < 0.2 else plain
        for plain, others in zip(usual, strange, strict=True)
    )


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_urls_of_all_kinds(part, tmp_path, monkeypatch):
    def nowhere(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(fetch.socket, "getaddrinfo", nowhere)
    good = base64.b64encode(saved(picture())).decode()
    rng, read = random.Random(part), 0
    readers = [reader(), reader(hosts=["a.example"], folder=tmp_path)]
    for _ in range(URLS // 3):
        url, name = strange_url(rng, good), rng.choice((None, "a", "", "\0", "x" * 300))
        part_ = rng.choice((ImagePart(url, "auto", name), VideoPart(url, name)))
        if rng.random() < 0.05:
            part_ = ImagePart(None, rng.choice(("auto", "low", "", "\ud800", "x" * 999)), name)
        read += checked(rng.choice(readers), part_)
    assert 50 < read < URLS // 3 - 50


def test_damaged_films(tmp_path: Path):
    """Some at a time, as clients would: each has a process of its own."""
    paths = [make_video(tmp_path / f"a.{kind}", range(12)) for kind in ("mp4", "mkv", "avi")]
    files = [path.read_bytes() for path in paths]
    to, told, failed = reader(film_seconds=10.0, film_megabytes=500), [], []

    def some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(FILMS // 2):
            content = damaged(rng.choice(files), rng)
            options = VideoOptions(num_frames=rng.choice((None, -1, 2)))
            try:
                told.append(checked(to, VideoPart(data(content, "video/mp4")), options))
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=some, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[:3]
    assert {True, False} == set(told) and len(told) == FILMS
