"""Images of requests: every kind of file, whatever is wrong with them, names, and limits."""

import base64
import io
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax import config
from llava_mini_jax.data.media.image_file import _UPRIGHT
from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.ticket import Medium
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fetch import Fetcher
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.media import MediaReader
from llava_mini_jax.serving.parts import ImagePart, VideoOptions, VideoPart
from tests import tiny_model
from tests.data import bombs

BUNDLE = tiny_model.bundle("paper")
TILES = replace(BUNDLE, images=replace(BUNDLE.images, grid=2))
# What no answer may hold: paths, addresses, what Python and its libraries call things.
MACHINE = re.compile(
    r"/(tmp|proc|dev|home|usr|root|work)\b|0x[0-9a-f]{3,}|Traceback|Error\b|<[\w.]+ |PIL|numpy|"
    r"av\.|line \d+|errno|BytesIO|NoneType|\.py\b|FFmpeg",
    re.I,
)


def reader(bundle: config.Bundle = BUNDLE, **options: Any) -> MediaReader:
    limits = {k: options.pop(k) for k in list(options) if k in Limits.__dataclass_fields__}
    return MediaReader(bundle, Limits(**limits), **options)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(tiny_model.picture(seed))


def read(*parts: Any, to: MediaReader | None = None, tenant: str = "") -> list[Medium]:
    given = [ImagePart(part) if isinstance(part, str) else part for part in parts]
    return (to or reader()).read(given, VideoOptions(), tenant)


def pixels(medium: Medium) -> np.ndarray:
    (frame,) = medium.read()
    return frame


def refused(*parts: Any, **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*parts, **options)
    assert not MACHINE.search(caught.value.message), caught.value.message
    assert caught.value.message.count("\n") == 0
    return caught.value


def shown(image: Image.Image, bundle: config.Bundle = BUNDLE) -> np.ndarray:
    return preprocess(image, bundle.images)


# --- Files of all kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_lossless_files_give_their_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = picture()
    (medium,) = read(data(saved(image, kind, **options), "application/x-anything"))
    assert medium.frames == 1 and len(medium.key) == 32
    np.testing.assert_array_equal(pixels(medium), shown(image))
    np.testing.assert_array_equal(pixels(medium), shown(image))  # it may be read again


def test_jpeg_gives_almost_its_pixels():
    found = pixels(read(data(saved(picture(), "JPEG", quality=95)))[0]).astype(int)
    assert np.abs(found - shown(picture())).mean() < 10


GREYS = Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))
MODES = {
    "palette": (picture().quantize(12), picture()),
    "grey": (picture().convert("L"), picture().convert("L").convert("RGB")),
    "one bit": (picture().convert("1"), picture().convert("1").convert("RGB")),
    "16 bits": (
        GREYS,
        Image.fromarray(((np.asarray(GREYS, np.uint32) + 128) // 257).astype(np.uint8)).convert(
            "RGB"
        ),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, expected = MODES[mode]
    np.testing.assert_array_equal(pixels(read(data(saved(image)))[0]), shown(expected))


def test_cmyk():
    red = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    found = pixels(read(data(saved(red, "JPEG")))[0])
    assert found[0, 8, 8, 0] > 220 and found[0, 8, 8, 1:].max() < 40


def transparent() -> dict[str, bytes]:
    """Black on the left, on the right nothing, over which there is grey or black."""
    rgba = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 20, 40))
    keyed = Image.new("RGB", (40, 40), (9, 9, 9))
    keyed.paste((0, 0, 0), (0, 0, 20, 40))
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.paste(0, (0, 0, 20, 40))
    return {
        "alpha": saved(rgba),
        "grey and alpha": saved(rgba.convert("LA")),
        "a colour": saved(keyed, transparency=(9, 9, 9)),
        "a colour of a palette": saved(palette, transparency=1),
        "gif": saved(rgba, "GIF"),
        "webp": saved(rgba, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("kind", transparent())
def test_what_is_transparent_is_white(kind):
    found = pixels(read(data(transparent()[kind]))[0])
    assert found[0, 8, 2].max() < 60 and found[0, 8, 13].min() > 200


def test_half_transparent_is_blended():
    grey = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert set(np.unique(pixels(read(data(saved(grey)))[0]))) == {127}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    undo = _UPRIGHT.get({6: 8, 8: 6}.get(orientation, orientation))
    stored = picture() if undo is None else picture().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(read(data(saved(stored, exif=exif)))[0])
    np.testing.assert_array_equal(found, shown(picture()))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("bundle", [BUNDLE, TILES])
def test_thin_pictures(size, bundle):
    image = Image.new("RGB", size, (250, 0, 0))
    (medium,) = read(data(saved(image)), to=reader(bundle))
    np.testing.assert_array_equal(pixels(medium), shown(image, bundle))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 120, 240)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    (medium,) = read(data(content))
    assert medium.frames == 1 and pixels(medium).max() < 10


# --- Data urls ------------------------------------------------------------------------------------

GOOD = base64.b64encode(saved(picture())).decode()


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:;base64,", "data:text/html;"
             "charset=utf-8;name=a.png;base64,", "Data:image/jpeg;Base64,"]
)  # fmt: skip
def test_heads_of_data_urls(head):
    np.testing.assert_array_equal(pixels(read(head + GOOD)[0]), shown(picture()))


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:,", "data:image/png", "data:image/png,abc", "data:image/png;base64",
        "data:image/png;base64;x," + GOOD, "data:" + "a" * 300 + ";base64," + GOOD,
        "data:image/png;base64," + GOOD[:-1], "data:image/png;base64," + GOOD + "=",
        "data:image/png;base64,\n" + GOOD, "data:image/png;base64, " + GOOD,
        "data:image/png;base64," + GOOD[:40] + "é" + GOOD[41:], "data:image/png;base64,%41",
        "data:image/png;base64," + GOOD[:40] + "-_" + GOOD[42:], "data:image/png;base64,\ud800",
        "data:image/png;base64,AAAA====", "data:image/png;base64,AB=C", "data:image/png;base64,",
    ],
)  # fmt: skip
def test_wrong_data_urls_are_400(url):
    error = refused(url)
    assert error.status == 400 and error.param == "image_url" and "image 1" in error.message


@pytest.mark.parametrize("url", ["", "a.png", "/etc/passwd", "javascript:1", "ftp://a/b", "blob:x"])
def test_other_urls_are_400(url):
    assert refused(url).status == 400


@pytest.mark.parametrize("url", ["http://a.example/b", "HTTPS://a.example/", "http:\\\\a", "http:"])
def test_remote_urls_are_off_by_default(url, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert "does not fetch" in refused(url).message
    with pytest.raises(ApiError, match="does not fetch"):
        reader().read([VideoPart(url)], VideoOptions(), "")


def test_the_seconds_of_a_requests_remote_files_are_told_once(monkeypatch):
    def fetched(self, url: str, **options: Any) -> bytes:
        time.sleep(0.02)
        return saved(picture())

    monkeypatch.setattr(Fetcher, "fetch", fetched)
    told, to = [], reader(hosts=["a.example"])
    to.fetched = told.append
    read("http://a.example/1", data(saved(picture(1))), "http://a.example/2", to=to)
    assert len(told) == 1 and told[0] >= 2 * 0.02
    read(data(saved(picture(1))), to=to)
    assert len(told) == 1


def test_a_film_for_a_compressor_of_pictures_is_400():
    m3 = replace(BUNDLE.model, compressor=M3Config(count=1), prefusion_layers=0)
    with pytest.raises(ApiError, match='video 1: compressor "m3" is defined on images') as caught:
        reader(replace(BUNDLE, model=m3)).read([VideoPart("data:x")], VideoOptions(), "")
    assert caught.value.status == 400 and caught.value.param == "video_url"


FILES = {
    "empty": b"",
    "text": b"<html>no</html>",
    "truncated": saved(picture().resize((200, 200)))[:900],
    "truncated jpeg": saved(picture().resize((200, 200)), "JPEG")[:900],
    "tiff": saved(picture(), "TIFF"),
    "ppm": saved(picture(), "PPM"),
    "jpeg 2000": saved(picture(), "JPEG2000"),
    "a header alone": saved(picture())[:33],
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_picture_is_400(name):
    error = refused(data(FILES[name]))
    assert error.status == 400 and error.param == "image_url"


# --- Bombs and limits -----------------------------------------------------------------------------

LARGE = """
import base64, resource, sys, time
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fetch import Fetcher
from tests.serving import test_media
reader, big = test_media.reader(), sys.stdin.read()
test_media.refused("data:;base64,AAAA", to=reader)  # the way to an error is warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
error = test_media.refused(big, to=reader)
took = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(error.status, "50,000,000 pixels" in error.message, took, (after - before) / 1024)
"""


def test_a_picture_of_a_gigapixel_is_refused_at_once():
    content = bombs.KINDS["png: pixels beyond the limit"]()
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        input=data(content), capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    status, named, seconds, megabytes = done.stdout.split()
    assert (status, named) == ("400", "True")
    assert float(seconds) < 0.05 and float(megabytes) < 200


def test_fifty_million_pixels_are_the_limit():
    kind, limit = Image.new("1", (100, 80)), 8000
    assert pixels(read(data(saved(kind)), to=reader(image_pixels=limit))[0]).shape
    assert "7,999 pixels" in refused(data(saved(kind)), to=reader(image_pixels=limit - 1)).message
    assert Limits().image_pixels == 50_000_000


@pytest.mark.parametrize("kind", sorted(bombs.KINDS))
def test_bombs_are_refused_or_read(kind):
    try:
        (medium,) = read(data(bombs.KINDS[kind]()))
        assert pixels(medium).shape == (1, 16, 16, 3)
    except ApiError as error:
        assert error.status == 400 and not MACHINE.search(error.message)


def test_decoded_bytes_of_a_request():
    one = data(saved(Image.new("1", (100, 80))))
    to = reader(decoded_bytes=4 * 8000 * 3)
    assert len(read(one, one, one, to=to)) == 3
    assert refused(one, one, one, one, to=to).status == 400


def test_numbers_of_media():
    to = reader(images=2, videos=1)
    one = data(saved(picture()))
    assert len(read(one, one, to=to)) == 2
    assert "at most 2 image(s)" in refused(one, one, one, to=to).message
    film = VideoPart("data:video/jpeg;base64," + GOOD)
    assert "at most 1 video(s)" in refused(film, film, to=to).message
    assert len(read(film, one, to=to)) == 2


def test_order_of_the_parts():
    images = [picture(seed) for seed in range(5)]
    media = read(*(data(saved(image)) for image in images))
    for medium, image in zip(media, images, strict=True):
        np.testing.assert_array_equal(pixels(medium), shown(image))
    assert len({medium.key for medium in media}) == 5


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_no_limit_is_none(name, value):
    with pytest.raises(InputError, match=name):
        Limits(**{name: value})


# --- Keys, detail and names -----------------------------------------------------------------------


def test_keys_are_of_content_and_of_what_makes_pixels():
    one, two = data(saved(picture())), data(saved(picture()), "image/webp")
    other = data(saved(picture(), "BMP"))
    keys = {read(url)[0].key for url in (one, two)}
    assert len(keys) == 1  # by content
    keys |= {read(other)[0].key, read(one, to=reader(TILES))[0].key}
    keys |= {read(ImagePart(one, "low"), to=reader(TILES))[0].key}
    smaller = replace(BUNDLE, images=replace(BUNDLE.images, size=8))
    crop = replace(BUNDLE, images=replace(BUNDLE.images, aspect="crop"))
    keys |= {read(one, to=reader(bundle))[0].key for bundle in (smaller, crop)}
    assert len(keys) == 6


def test_detail_of_a_model_with_tiles():
    url, to = data(saved(picture().resize((64, 64)))), reader(TILES)
    found = {d: read(ImagePart(url, d), to=to)[0] for d in ("auto", "low", "high", "original")}
    assert len({medium.key for medium in found.values()}) == 2
    high, low = pixels(found["high"]), pixels(found["low"])
    assert high.shape == low.shape == (5, 16, 16, 3)
    np.testing.assert_array_equal(high, pixels(found["auto"]))
    np.testing.assert_array_equal(low[-1], high[-1])
    np.testing.assert_array_equal(low, shown(Image.fromarray(high[-1]), TILES))
    assert (low[0] != high[0]).any()


def test_detail_of_a_model_without_tiles():
    url = data(saved(picture()))
    keys = {read(ImagePart(url, detail))[0].key for detail in ("auto", "low", "high", "original")}
    assert len(keys) == 1
    error = refused(ImagePart(url, "enormous" * 100))
    assert error.status == 400 and len(error.message) < 200


def test_a_picture_that_was_named_need_not_be_sent_again():
    to, url = reader(TILES), data(saved(picture()))
    (sent,) = read(ImagePart(url, "auto", "holiday"), to=to, tenant="a")
    (again,) = read(ImagePart(None, "auto", "holiday"), to=to, tenant="a")
    assert again.key == sent.key
    np.testing.assert_array_equal(pixels(again), pixels(sent))
    (low,) = read(ImagePart(None, "low", "holiday"), to=to, tenant="a")
    (expected,) = read(ImagePart(url, "low"), to=to)
    assert low.key == expected.key
    np.testing.assert_array_equal(pixels(low), pixels(expected))


def test_names_are_a_tenants_own():
    to = reader()
    read(ImagePart(data(saved(picture())), "auto", "x"), to=to, tenant="a")
    for part, tenant in [
        (ImagePart(None, "auto", "x"), "b"),
        (ImagePart(None, "auto", "x"), ""),
        (ImagePart(None, "auto", "y"), "a"),
        (VideoPart(None, "x"), "a"),
    ]:
        error = refused(part, to=to, tenant=tenant)
        assert error.status == 404 and error.param == "uuid"


def test_a_name_goes_on_to_what_is_sent_last():
    to = reader()
    for seed in (0, 1):
        read(ImagePart(data(saved(picture(seed))), "auto", "x"), to=to)
    assert refused(ImagePart(data(b"no"), "auto", "x"), to=to).status == 400
    np.testing.assert_array_equal(
        pixels(read(ImagePart(None, "auto", "x"), to=to)[0]), shown(picture(1))
    )


def test_what_is_kept_fits_a_budget():
    to = reader(kept_bytes=3 * (1000 + 16 * 16 * 3))

    def known(name: str) -> bool:
        try:
            return bool(read(ImagePart(None, "auto", name), to=to))
        except ApiError:
            return False

    for name in "abc":
        read(ImagePart(data(saved(picture())), "auto", name), to=to)
    assert known("a")  # so that b is the longest unused
    read(ImagePart(data(saved(picture())), "auto", "d"), to=to)
    assert [known(name) for name in "abcd"] == [True, False, True, True]
    assert to._kept.used == 3 * (1000 + 16 * 16 * 3)


@pytest.mark.parametrize("uuid", ["", "x" * 257])
def test_wrong_names_are_400(uuid):
    assert refused(ImagePart(data(saved(picture())), "auto", uuid)).status == 400
    assert refused(ImagePart(None, "auto", uuid)).status == 400


def test_neither_url_nor_name_is_400():
    assert refused(ImagePart(None)).status == 400


# --- Local files ----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "open" / "deep").mkdir(parents=True)
    (tmp_path / "open-too").mkdir()
    for name in ("open/a.png", "open/deep/b c.png", "secret.png", "open-too/d.png"):
        picture().save(tmp_path / name)
    (tmp_path / "open" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "open" / "in.png").symlink_to(tmp_path / "open" / "a.png")
    (tmp_path / "open" / "up").symlink_to(tmp_path)
    (tmp_path / "open" / "loop").symlink_to(tmp_path / "open" / "loop")
    return tmp_path


def test_files_below_the_folder(place):
    to = reader(folder=place / "open")
    for name in ("a.png", "deep/b%20c.png", "deep/../a.png", "in.png"):
        (medium,) = read(f"file://{place}/open/{name}", to=to)
        np.testing.assert_array_equal(pixels(medium), shown(picture()))
    assert pixels(read(f"FILE://localhost{place}/open/a.png", to=to)[0]).size


def test_files_elsewhere_are_as_if_they_were_not(place):
    to = reader(folder=place / "open")
    urls = [f"file://{place}/{name}" for name in (
        "secret.png", "open/out.png", "open/up/secret.png", "open/../secret.png", "open/%2e%2e/"
        "secret.png", "open-too/d.png", "open/none.png", "open", "open/", "open/loop", "open/a.png"
        "/x", "open/a.png%00", "open/a.png?x", "open/a.png#x", "open/" + "a" * 300)]  # fmt: skip
    urls += [
        "file:///etc/passwd",
        "file:///dev/zero",
        "file:///proc/self/environ",
        "file://",
        "file:",
    ]
    urls += [f"file://evil{place}/open/a.png", "file:a.png", "file:///" + "a/" * 5000]
    told = {(error.status, error.message) for error in (refused(url, to=to) for url in urls)}
    assert len(told) == 1 and told.pop()[0] == 400


def test_local_files_are_off_by_default(place):
    assert refused(f"file://{place}/open/a.png").status == 400
    with pytest.raises(InputError, match="is not there"):
        reader(folder=place / "none")


def test_large_local_files_are_refused(place):
    to = reader(folder=place / "open", download_bytes=100)
    assert "100 bytes" in refused(f"file://{place}/open/a.png", to=to).message


# --- Threads --------------------------------------------------------------------------------------


def test_threads_get_their_own_pictures():
    to, wrong = reader(), []

    def ask(seed: int) -> None:
        for turn in range(10):
            part = ImagePart(data(saved(picture(seed))), "auto", f"{turn % 3}")
            (medium,) = read(part, to=to, tenant=str(seed))
            (again,) = read(ImagePart(None, "auto", f"{turn % 3}"), to=to, tenant=str(seed))
            if not (pixels(medium) == shown(picture(seed))).all() or again.key != medium.key:
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
