"""Images: from an upright RGB image to the square uint8 parts that the tower reads.

    file / bytes / PIL --image_file.load_image--> upright RGB image
        --split into grid x grid sub-images (grid > 1), the whole image last-->
        --pad to a square, or shortest side + centre crop, or squeeze--> uint8 [J, size, size, 3]

Rescaling and normalising happen on the device (`ImageConfig.mean`, `ImageConfig.std`): uint8 is a
quarter of the bytes of float32.

The arithmetic is the release's (CLIP's image processor after its own padding and splitting), equal
in every uint8 value. It is written with Pillow directly rather than with transformers'
CLIPImageProcessor: both give the same pixels, but Pillow alone needs no slow import, takes three
quarters of the time, and lets the padded square be resized without ever being whole in memory.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_mini_jax.data.media.image_file import BAND_PIXELS, TooLargeError, load_image
from llava_mini_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGEST_RESIZED = 2**25
_LARGEST_WORK = 2**28  # pixels of a padded image that are resized one by one
_LARGEST_ROWS = 2**28  # bytes
# SigLIP 2's published folders resize with the second one. A filter that reaches further than two
# pixels would read beyond what is cut out for it below.
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes parts.

    `split` only matters with `aspect="pad"` and `grid > 1`: the paper's dialect and the release's
    training pad the whole image and then split it; the release's inference splits first and pads
    each part separately. The two agree only for square images with even sides.
    """

    size: int  # side of one part in pixels
    # "pad": onto a square of the mean colour; "crop": resize the shortest side, centre crop;
    # "squeeze": resize to a square, whatever the shape (SigLIP's default)
    aspect: str
    grid: int  # k: k * k sub-images and the whole image; 1: the whole image alone
    split: str  # "pad_then_split" or "split_then_pad"
    repeat_whole: bool  # with grid 1 show the image twice (release's ScienceQA, EgoSchema scripts)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str  # filter for resizing, one of FILTERS

    def __post_init__(self) -> None:
        for name, value, known in (
            ("aspect", self.aspect, ("pad", "crop", "squeeze")),
            ("resample", self.resample, tuple(FILTERS)),
            ("split", self.split, ("pad_then_split", "split_then_pad")),
        ):
            if value not in known:
                raise InputError(f"ImageConfig.{name} is {value!r}; use one of {known}.")
        for name, number in (("size", self.size), ("grid", self.grid)):
            if number < 1:
                raise InputError(f"ImageConfig.{name} is {number}; it must be 1 or more.")

    @property
    def parts(self) -> int:
        """J, the number of parts of one image."""
        return self.grid**2 + 1 if self.grid > 1 or self.repeat_whole else 1


def preprocess(image: Image.Image, cfg: ImageConfig) -> np.ndarray:
    """uint8 [J, size, size, 3]: the sub-images row by row, the whole image last.

    J is `cfg.parts`. `image` is an image as `load_image` gives it.
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
        elif cfg.aspect == "squeeze":
            parts = [_resize(crop, cfg.size, cfg.size, (0, 0, *crop.size), cfg) for crop in crops]
        else:
            parts = [_resize_and_crop(crop, cfg) for crop in crops]
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
    """(left, top, side) of the square around the image, in its own coordinates."""
    side = max(image.size)
    return -((side - image.width) // 2), -((side - image.height) // 2), side


def _resize(
    image: Image.Image,
    width: int,
    height: int,
    box: tuple[float, float, float, float],
    cfg: ImageConfig,
) -> Image.Image:
    """By the filter, along rows first and then along columns, each rounded to uint8.

    Two calls, because Pillow 13 began to choose the order by the shape, which moves pixels by
    several grey levels; all earlier versions, and so the release, do the rows first.
    """
    (left, top, right, bottom), by = box, FILTERS[cfg.resample]
    rows = image.resize((width, image.height), by, (left, 0, right, image.height))
    return rows.resize((width, height), by, (0, top, width, bottom))


def _resize_window(
    image: Image.Image, left: int, top: int, side: int, cfg: ImageConfig
) -> Image.Image:
    """A square window of the image, the mean colour outside of it, resized to size x size.

    The first pass goes band by band, which changes no pixel: the padded square of a long panorama
    is never whole in memory. Rows that are the mean colour alone are not resized, nor, of very
    narrow images, columns (the same to one grey level).

    Raises TooLargeError for an image so long that even the resized rows take too much memory.
    """
    if (left, top, side) == (0, 0, cfg.size) and image.size == (side, side):
        return image  # no filter changes anything at the same size
    fill = tuple(int(mean * 255) for mean in cfg.mean)  # cut off, as in the release
    if 4 * cfg.size * side > _LARGEST_ROWS:
        raise TooLargeError(
            f"Cannot read an image of {image.width} x {image.height} pixels: its sides are too"
            f" different; at most {_LARGEST_ROWS // 4 // cfg.size:,} pixels long can be padded to a"
            " square. Cut it."
        )
    first, last = max(0, -top), min(side, image.height - top)
    scale = side / cfg.size
    columns = (0, cfg.size)
    if side * max(0, last - first) > _LARGEST_WORK:
        reach = 2 * scale + 2  # of the bicubic kernel, in pixels
        right = int((image.width - left + reach) / scale) + 1
        columns = (max(0, int((-left - reach) / scale)), min(cfg.size, right))
    # What the kernel reads of the window for these columns, and a pixel or two more.
    x0 = max(0, int(columns[0] * scale - 2 * scale) - 2)
    x1 = min(side, int(columns[1] * scale + 2 * scale) + 3)
    box = (columns[0] * scale - x0, columns[1] * scale - x0)
    band_height = max(1, BAND_PIXELS // (x1 - x0))
    rows = Image.new("RGB", (cfg.size, side), fill)
    for y in range(first, last, band_height):
        band = Image.new("RGB", (x1 - x0, min(band_height, last - y)), fill)
        band.paste(image, (-left - x0, -top - y))
        size = (columns[1] - columns[0], band.height)
        shown = band.resize(size, FILTERS[cfg.resample], (box[0], 0, box[1], band.height))
        rows.paste(shown, (columns[0], y))
    return rows.resize((cfg.size, cfg.size), FILTERS[cfg.resample])


def _resize_and_crop(image: Image.Image, cfg: ImageConfig) -> Image.Image:
    """Shortest side to the size, then the centre, as CLIP's image processor (long side cut off)."""
    (width, height), size = image.size, cfg.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_long * size <= _LARGEST_RESIZED:
        whole = _resize(image, new_width, new_height, (0, 0, width, height), cfg)
        return whole.crop((left, top, left + size, top + size))
    # Hundreds of times longer than wide: the release would need gigabytes for an image of which
    # it keeps one square. Only what that square shows is resized (the same to one grey level).
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    margin = int(2 * max(1, x, y)) + 2  # what the bicubic kernel reads beyond the square
    x0, y0 = max(0, int(box[0]) - margin), max(0, int(box[1]) - margin)
    x1, y1 = min(width, int(box[2]) + margin), min(height, int(box[3]) + margin)
    shown = (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
    return _resize(image.crop((x0, y0, x1, y1)), size, size, shown, cfg)
