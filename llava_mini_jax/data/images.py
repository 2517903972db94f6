"""Pictures: from a file, bytes or an open picture to the square uint8 parts that the tower reads.

    file / bytes / PIL --load_image--> upright RGB picture
        --split into grid x grid sub-images (grid > 1), the whole picture last-->
        --pad to a square, or shortest side + centre crop; bicubic--> uint8 [J, size, size, 3]

Rescaling and normalising happen on the device (`ImageConfig.mean`, `ImageConfig.std`): uint8 is a
quarter of the bytes of float32.

The arithmetic is the release's (CLIP's image processor after its own padding and splitting), equal
in every uint8 value. It is written with Pillow directly rather than with transformers'
CLIPImageProcessor: both give the same pixels, but Pillow alone needs no slow import, takes three
quarters of the time, and lets the padded square be resized without ever being whole in memory.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_mini_jax.errors import InputError

# MPO, the several pictures in one file of some cameras, opens as JPEG and gives its first.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow's own hard limit (twice MAX_IMAGE_PIXELS), checked here before anything is decoded.
MAX_PIXELS = 178_956_970
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BAND_PIXELS = 2**24
_LARGEST_RESIZED = 2**26
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture becomes parts.

    `split` only matters with `aspect="pad"` and `grid > 1`: the paper's dialect and the release's
    training pad the whole picture and then split it; the release's inference splits first and pads
    every part on its own. The two agree only for square pictures with even sides.
    """

    size: int  # side of one part in pixels
    aspect: str  # "pad": square canvas of the mean colour; "crop": shortest side + centre crop
    grid: int  # k: k * k sub-images and the whole picture; 1: the whole picture alone
    split: str  # "pad_then_split" | "split_then_pad"
    repeat_whole: bool  # release's ScienceQA and EgoSchema scripts: grid 1 gives the picture twice
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, value, known in (
            ("aspect", self.aspect, ("pad", "crop")),
            ("split", self.split, ("pad_then_split", "split_then_pad")),
        ):
            if value not in known:
                raise InputError(f"ImageConfig.{name} is {value!r}; use one of {known}.")
        for name, number in (("size", self.size), ("grid", self.grid)):
            if number < 1:
                raise InputError(f"ImageConfig.{name} is {number}; it must be 1 or more.")

    @property
    def parts(self) -> int:
        """J, the number of parts of one picture."""
        return self.grid**2 + 1 if self.grid > 1 or self.repeat_whole else 1


def load_image(source: Path | str | bytes | Image.Image) -> Image.Image:
    """The picture as RGB, upright.

    The EXIF orientation is applied (the release ignores it, so that photographs of a phone reach
    its model lying on their side). An animation gives its first frame. Transparency is dropped the
    way the release does it, by `convert("RGB")`: the colours below it show, nothing is blended.
    16-bit greyscale is scaled to 8 bits (`convert` would clip it to white).

    Raises InputError for everything that is not a whole picture in one of FORMATS with at most
    MAX_PIXELS pixels; the size is checked before anything is decoded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the given picture")
    if isinstance(source, bytes):
        name, empty, content = f"the picture given as {len(source)} bytes", not source, source
    else:
        name, path = f"the picture {source}", Path(source)
        try:
            exists, is_file = path.exists(), path.is_file()
            empty, content = is_file and path.stat().st_size == 0, path
        except (OSError, ValueError) as error:  # a name too long, no permission for the folder
            raise InputError(f"Cannot open {name}: {error}; check the path.") from error
        if not is_file:  # a named pipe would block for ever, so it does not get as far as open
            problem = "it is not a file" if exists else "there is no such file"
            raise InputError(f"Cannot open {name}: {problem}; check the path.")
    if empty:
        raise InputError(f"Cannot read {name}: it is empty (0 bytes); copy or download it again.")
    try:
        stream = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(stream, formats=FORMATS) as image:
            return _decode(image, name)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text would show a memory address
        raise InputError(
            f"Cannot read {name}: not a picture in one of the formats {', '.join(FORMATS)};"
            " convert it to JPEG or PNG."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"Cannot read {name}: {error}; make it smaller.") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise InputError(f"Cannot read {name}: {error}; copy or download it again.") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"Cannot read {name}: {image.width} x {image.height} pixels, the limit is"
            f" {MAX_PIXELS:,} in all; make it smaller."
        )
    if image.width == 0 or image.height == 0:
        raise InputError(f"Cannot read {name}: it is {image.width} x {image.height} pixels.")
    try:
        image.load()
        rgb = _rgb(image, name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        raise InputError(f"Cannot read {name}: {error}; copy or download it again.") from error
    try:
        return ImageOps.exif_transpose(rgb)
    except Exception:  # a damaged EXIF block beside a whole picture: nothing says how to turn it
        return rgb.copy()


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"Cannot read {name}: its pixel values ({image.mode!r}, {values.min()} to"
                f" {values.max()}) have no known white; convert it to 8 or 16 bits."
            )
        image_8bit = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        scaled = Image.fromarray(image_8bit).convert("RGB")
        scaled.info = dict(image.info)
        return scaled
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def preprocess(image: Image.Image, cfg: ImageConfig) -> np.ndarray:
    """uint8 [J, size, size, 3]: the sub-images row by row, the whole picture last.

    J is `cfg.parts`. `image` is a picture as `load_image` gives it.
    """
    if image.mode != "RGB":
        image = load_image(image)
    if cfg.aspect == "pad" and cfg.split == "pad_then_split":
        left, top, side = _square(image)
        windows = [
            (left + x, top + y, right - x)
            for x, y, right, _ in _boxes(side, side, cfg.grid, cfg.repeat_whole)
        ]
        parts = [_resize_window(image, *window, cfg) for window in windows]
    else:
        crops = [
            image if box == (0, 0, *image.size) else image.crop(box)
            for box in _boxes(*image.size, cfg.grid, cfg.repeat_whole)
        ]
        if cfg.aspect == "pad":
            parts = [_resize_window(crop, *_square(crop), cfg) for crop in crops]
        else:
            parts = [_resize_and_crop(crop, cfg.size) for crop in crops]
    return np.stack([np.asarray(part) for part in parts])


def _boxes(
    width: int, height: int, grid: int, repeat_whole: bool
) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of every part; remainder columns and rows belong to no sub-image.

    _boxes(5, 2, 2, False) == [(0, 0, 2, 1), (2, 0, 4, 1), (0, 1, 2, 2), (2, 1, 4, 2), (0, 0, 5, 2)]
    """
    whole = (0, 0, width, height)
    if grid == 1 and not repeat_whole:
        return [whole]
    # A side shorter than the grid gives one-pixel blocks that overlap; the release crashes there.
    w, h = max(1, width // grid), max(1, height // grid)
    lefts = [min(column * w, width - w) for column in range(grid)]
    tops = [min(row * h, height - h) for row in range(grid)]
    return [*((x, y, x + w, y + h) for y in tops for x in lefts), whole]


def _square(image: Image.Image) -> tuple[int, int, int]:
    """(left, top, side) of the square around the picture, in its own coordinates."""
    side = max(image.size)
    return -((side - image.width) // 2), -((side - image.height) // 2), side


def _resize(
    image: Image.Image, width: int, height: int, box: tuple[float, float, float, float]
) -> Image.Image:
    """Bicubic, along rows first and then along columns, each rounded to uint8.

    Two calls, because Pillow 13 began to choose the order by the shape, which moves pixels by
    several grey levels; all earlier versions, and so the release, do the rows first.
    """
    left, top, right, bottom = box
    rows = image.resize((width, image.height), _BICUBIC, (left, 0, right, image.height))
    return rows.resize((width, height), _BICUBIC, (0, top, width, bottom))


def _resize_window(
    image: Image.Image, left: int, top: int, side: int, cfg: ImageConfig
) -> Image.Image:
    """A square window of the picture, the mean colour outside of it, resized to size x size.

    The first pass goes band by band, which changes no pixel: the padded square of a long panorama
    is never whole in memory.
    """
    if (left, top, side) == (0, 0, cfg.size) and image.size == (side, side):
        return image  # bicubic at the same size changes nothing
    fill = (int(cfg.mean[0] * 255), int(cfg.mean[1] * 255), int(cfg.mean[2] * 255))
    band_height = max(1, _BAND_PIXELS // side)
    rows = Image.new("RGB", (cfg.size, side))
    for y in range(0, side, band_height):
        band = Image.new("RGB", (side, min(band_height, side - y)), fill)
        band.paste(image, (-left, -top - y))
        rows.paste(band.resize((cfg.size, band.height), _BICUBIC), (0, y))
    return rows.resize((cfg.size, cfg.size), _BICUBIC)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size`, then the centre: CLIP's image processor (long side rounded down)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_long * size <= _LARGEST_RESIZED:
        whole = _resize(image, new_width, new_height, (0, 0, width, height))
        return whole.crop((left, top, left + size, top + size))
    # Hundreds of times longer than wide: the release would need gigabytes for a picture of which
    # it keeps one square. Only what that square shows is resized (the same to one grey level).
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    margin = int(2 * max(1, x, y)) + 2  # what the bicubic kernel reads beyond the square
    x0, y0 = max(0, int(box[0]) - margin), max(0, int(box[1]) - margin)
    x1, y1 = min(width, int(box[2]) + margin), min(height, int(box[3]) + margin)
    shown = (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
    return _resize(image.crop((x0, y0, x1, y1)), size, size, shown)
