"""Image files: from a path, bytes or an open image to one upright RGB image.

    file --picture_limits.check_file--> Pillow, within time --EXIF orientation, RGB--> image

Whatever is wrong with a file is one sentence, an InputError.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_mini_jax.data.media import picture_limits
from llava_mini_jax.data.media.picture_limits import TooMuchError
from llava_mini_jax.errors import InputError

# Pillow's words about tags that it cannot read: nothing that is shown depends on them.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# MPO, the several images in one file of some cameras, opens as JPEG and gives its first.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow's own hard limit (twice MAX_IMAGE_PIXELS), checked here before anything is decoded.
MAX_PIXELS = 178_956_970
BAND_PIXELS = 2**24  # of a large image that are worked on together
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooLargeError(InputError):
    """An image of more pixels than are allowed, or one that costs more than images do."""


def load_image(
    source: Path | str | bytes | Image.Image,
    *,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
) -> Image.Image:
    """The image as RGB, upright.

    The EXIF orientation is applied (the release ignores it, so that photographs of a phone reach
    its model lying on their side). An animation gives its first frame. Without a `background`,
    transparency is dropped the way the release does it, by `convert("RGB")`: the colours below it
    show, nothing is blended. 16-bit greyscale is scaled to 8 bits (`convert` would clip it to
    white).

    Raises InputError for everything that is not a whole image in one of the formats, and
    TooLargeError for more than `max_pixels` pixels, or more than picture_limits.py allows, which
    is checked before anything is decoded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the given image", 0, max_pixels, background)
    if isinstance(source, bytes):
        name, content = f"the image given as {len(source)} bytes", source
    else:
        name = f"the image {source}"
        content = _content(Path(source), name)
    if not content:
        raise InputError(f"Cannot read {name}: it is empty (0 bytes); copy or download it again.")
    with _readable(name, formats):
        picture_limits.check_file(content)
        opened = functools.partial(Image.open, io.BytesIO(content), formats=tuple(formats))
        with picture_limits.within_time(opened, len(content), 0) as image:
            return _decode(image, name, len(content), max_pixels, background)


def _content(path: Path, name: str) -> bytes:
    try:
        exists, is_file = path.exists(), path.is_file()
        size = path.stat().st_size if is_file else 0
    except (OSError, ValueError) as error:  # a name too long, no permission for the folder
        raise InputError(f"Cannot open {name}: {error}; check the path.") from error
    if not is_file:  # a named pipe would block for ever, so it does not get as far as open
        problem = "it is not a file" if exists else "there is no such file"
        raise InputError(f"Cannot open {name}: {problem}; check the path.")
    with _readable(name):
        if size > picture_limits.MAX_BYTES:
            raise TooMuchError(f"its file has {size:,} bytes")
        return path.read_bytes()


@contextlib.contextmanager
def _readable(name: str, formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Whatever goes wrong while an image is read, as the sentence about it."""
    try:
        yield
    except TooMuchError as error:
        more = "make it smaller, or save it again"
        raise TooLargeError(f"Cannot read {name}: {error}; {more}.") from error
    except InputError:
        raise
    except MemoryError as error:
        more = "there is not enough memory for it; make it smaller"
        raise TooLargeError(f"Cannot read {name}: {more}.") from error
    except UnidentifiedImageError as error:  # its own text would show a memory address
        raise InputError(
            f"Cannot read {name}: not an image in one of the formats {', '.join(formats)};"
            " convert it to JPEG or PNG."
        ) from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"Cannot read {name}: {error}; make it smaller.") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise InputError(f"Cannot read {name}: {error}; copy or download it again.") from error


def _decode(
    image: Image.Image,
    name: str,
    size: int,
    max_pixels: int,
    background: tuple[int, int, int] | None,
) -> Image.Image:
    """`size` is that of its file in bytes, 0 for an image that is open."""
    if image.width * image.height > max_pixels:
        raise TooLargeError(
            f"Cannot read {name}: {image.width} x {image.height} pixels, the limit is"
            f" {max_pixels:,} in all; make it smaller."
        )
    if image.width == 0 or image.height == 0:
        raise InputError(f"Cannot read {name}: it is {image.width} x {image.height} pixels.")
    with _readable(name):
        turn = picture_limits.within_time(lambda: _turn(image), size, 0)
        picture_limits.check_bytes(image, turn is not None)
        picture_limits.within_time(image.load, size, image.width * image.height)
        rgb = _rgb(image, name, background)
        upright = rgb.transpose(turn) if turn is not None else rgb.copy() if rgb is image else rgb
    upright.info = {}  # what the file says beside the pixels, profiles of megabytes among it
    return upright


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the image becomes upright, by its EXIF block; None if it is, or nothing says it."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block beside a whole image
        return None


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A transparent image on a background, band by band: it is never whole in a third copy."""
    shown = Image.new("RGB", image.size, background)
    rows = max(1, BAND_PIXELS // 4 // image.width)
    for y in range(0, image.height, rows):
        band = image.crop((0, y, image.width, min(y + rows, image.height))).convert("RGBA")
        shown.paste(band, (0, y), band)
    return shown


def _rgb(image: Image.Image, name: str, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        extremes: Any = image.getextrema() if image.mode in ("I", "F") else (0, 65535)
        low, high = extremes
        if image.mode == "F" or low < 0 or high > 65535:
            raise InputError(
                f"Cannot read {name}: its pixel values ({image.mode!r}, {low} to"
                f" {high}) have no known white; convert it to 8 or 16 bits."
            )
        scaled = Image.new("RGB", image.size)
        rows = max(1, BAND_PIXELS // 4 // image.width)
        for y in range(0, image.height, rows):
            band = np.asarray(image.crop((0, y, image.width, min(y + rows, image.height))))
            eight = ((band.astype(np.uint32) + 128) // 257).astype(np.uint8)
            scaled.paste(Image.fromarray(eight).convert("RGB"), (0, y))
        return scaled
    if background is not None and image.has_transparency_data:
        return _over(image, background)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")
