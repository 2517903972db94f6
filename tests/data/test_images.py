"""Images: the release's pixels exactly, and an image or an InputError for whatever is read."""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini_jax.data.media import images
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.errors import InputError
from tests import golden_data

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = golden_data.folder("preprocess")
# golden array, without "_uint8" and "_every3" -> (aspect, grid, order of splitting and padding)
GOLDEN_MODES = {
    "pad_n1": ("pad", 1, "split_then_pad"),
    "square_n1": ("crop", 1, "split_then_pad"),
    "pad_n2": ("pad", 2, "split_then_pad"),
    "square_n2": ("crop", 2, "split_then_pad"),
    "train_pad_n2": ("pad", 2, "pad_then_split"),
}


def make_cfg(aspect="pad", grid=1, split="split_then_pad", repeat_whole=False, size=336):
    return ImageConfig(
        size=size,
        aspect=aspect,
        grid=grid,
        split=split,
        repeat_whole=repeat_whole,
        mean=images.CLIP_MEAN,
        std=images.CLIP_STD,
        resample="bicubic",
    )


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- The release's pixels -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GOLDEN_MODES)
@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.png"))])
def test_parts_equal_the_release(name, mode):
    expected = golden_data.pixels(GOLDEN / f"{name}.npz", mode)
    parts = preprocess(load_image(GOLDEN / f"{name}.png"), make_cfg(*GOLDEN_MODES[mode]))
    assert parts.dtype == np.uint8 and parts.shape[1:] == (336, 336, 3)
    np.testing.assert_array_equal(expected.seen(parts.transpose(0, 3, 1, 2)), expected.array)


def test_bands_change_no_pixel(monkeypatch):
    image = noise(211, 460)
    cfg = make_cfg(grid=2, split="pad_then_split", size=64)
    expected = preprocess(image, cfg)
    monkeypatch.setattr(images, "BAND_PIXELS", 460 * 13)
    np.testing.assert_array_equal(preprocess(image, cfg), expected)


@pytest.mark.parametrize("size", [(211, 460), (1000, 333), (37, 911)])
def test_cropping_before_resizing_is_the_same_to_a_grey_level(size, monkeypatch):
    image = noise(*size)
    expected = preprocess(image, make_cfg("crop")).astype(int)
    monkeypatch.setattr(images, "_LARGEST_RESIZED", 0)
    difference = np.abs(preprocess(image, make_cfg("crop")) - expected)
    # One grey level, rarely: the crop's corner is a float32 inside Pillow.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_rows_are_resized_before_columns():
    # Pillow 13 does it the other way round for this shape, older versions do not.
    image = noise(50, 400)
    rows = image.resize((336, 400), Image.Resampling.BICUBIC)
    expected = np.asarray(rows.resize((336, 336), Image.Resampling.BICUBIC))
    found = images._resize(image, 336, 336, (0, 0, 50, 400), make_cfg())
    np.testing.assert_array_equal(found, expected)
    found = preprocess(image, make_cfg("squeeze"))[0]
    np.testing.assert_array_equal(found, expected)


def test_order_and_number_of_parts():
    quadrants = np.zeros((64, 64, 3), np.uint8)
    quadrants[:32, :32], quadrants[:32, 32:], quadrants[32:, :32], quadrants[32:, 32:] = (
        10,
        20,
        30,
        40,
    )
    image = Image.fromarray(quadrants)
    parts = preprocess(image, make_cfg(grid=2, size=32))
    assert [int(part[16, 16, 0]) for part in parts[:4]] == [10, 20, 30, 40]
    assert {10, 20, 30, 40} <= set(parts[4][..., 0].ravel().tolist())
    once, twice = preprocess(image, make_cfg()), preprocess(image, make_cfg(repeat_whole=True))
    assert len(once) == 1 and len(twice) == 2
    np.testing.assert_array_equal(twice, np.concatenate([once, once]))
    for cfg in (make_cfg(), make_cfg(grid=2), make_cfg(grid=3), make_cfg(repeat_whole=True)):
        assert len(preprocess(image, cfg)) == cfg.parts


def test_padding_has_the_mean_colour():
    part = preprocess(Image.new("RGB", (336, 100)), make_cfg())[0]
    assert part[0, 0].tolist() == [122, 116, 104] and part[168, 168].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("split", ["pad_then_split", "split_then_pad"])
def test_extreme_shapes(size, aspect, split):
    grey = Image.new("RGB", size, (90, 90, 90))
    parts = preprocess(grey, make_cfg(aspect, 2, split, size=56))
    assert parts.shape == (5, 56, 56, 3)
    if aspect == "crop":
        assert (parts == 90).all()


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_formats_from_bytes_and_files(kind, tmp_path):
    content = saved(Image.new("RGB", (8, 6), (200, 10, 10)), kind)
    (tmp_path / "wrong_name.jpg").write_bytes(content)
    for source in (content, tmp_path / "wrong_name.jpg", str(tmp_path / "wrong_name.jpg")):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == (8, 6)
        assert np.abs(np.asarray(image)[0, 0].astype(int) - [200, 10, 10]).max() < 6  # JPEG, WEBP


def test_sixteen_bit_grey_is_scaled():
    ramp = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = load_image(saved(Image.fromarray(ramp)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    with pytest.raises(InputError, match="no known white"):
        load_image(saved(Image.fromarray(ramp.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = noise(9, 7).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_transparent_palette_shows_its_colours(recwarn):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    content = saved(palette, transparency=bytes([0, 7]))
    assert np.asarray(load_image(content))[0, 0].tolist() == [0, 0, 255]
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation(orientation, kind):
    upright = Image.new("RGB", (32, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 8, 8))
    undone_by = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose
    turn = Image.Transpose(undone_by[orientation]) if orientation > 1 else None
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(stored, kind, exif=exif))
    assert image.size == (32, 16)
    assert np.asarray(image)[2, 2].min() > 200 and np.asarray(image)[13, 29].max() < 50


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 120, 240)]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.asarray(load_image(content)).max() < 10


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"<html>not found</html>", "not an image"),
    "truncated png": (saved(noise(64, 64))[:2000], "truncated"),
    "truncated jpeg": (saved(noise(64, 64), "JPEG")[:2000], "truncated"),
    "not allowed": (saved(noise(4, 4), "PPM"), "not an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_are_input_errors(case, tmp_path):
    content, reason = BAD[case]
    (tmp_path / "picture.jpg").write_bytes(content)
    for source in (content, tmp_path / "picture.jpg"):
        with pytest.raises(InputError, match=reason) as caught:
            load_image(source)
        assert "0x" not in str(caught.value)  # no memory addresses
    assert "picture.jpg" in str(caught.value)


def test_bad_paths_are_input_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "missing.png", "no such file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / ("x" * 5000), "check the path"),
        ("nul\0byte", "check the path"),
    ]:
        with pytest.raises(InputError, match=reason):
            load_image(path)


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(3751 * 300)) for _ in range(100)) + packer.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    header = (30000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    script = """
import json, sys, time
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.errors import InputError
from tests.peak import peak_kilobytes
try:
    load_image(sys.argv[2])  # a missing file: the path to the error is warm
except InputError:
    pass
before, start = peak_kilobytes(), time.perf_counter()
try:
    load_image(sys.argv[1])
except InputError as error:
    seconds = time.perf_counter() - start
    grown = peak_kilobytes() - before
    print(json.dumps({"seconds": seconds, "kilobytes": grown, "message": str(error)}))
"""
    command = [sys.executable, "-c", script, tmp_path / "bomb.png", tmp_path / "missing.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    # Decoding would take seconds and gigabytes; the bar of 50 ms holds on an idle machine only.
    assert found["seconds"] < 1.0 and found["kilobytes"] < 200_000
    assert "178956970" in found["message"].replace(",", "")


SEEDS = {kind: saved(noise(24, 16), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=6),
    st.none() | st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore")  # Pillow remarks on damaged metadata
def test_damaged_pictures_give_a_picture_or_an_input_error(kind, flips, cut):
    content = bytearray(SEEDS[kind])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    damaged = bytes(content if cut is None else content[: cut % len(content)])
    try:
        image = load_image(damaged)
    except InputError:
        return
    assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8


# --- Settings -------------------------------------------------------------------------------------


def test_settings_that_do_not_exist():
    with pytest.raises(InputError, match="aspect"):
        make_cfg("stretch")
