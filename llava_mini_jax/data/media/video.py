"""Videos: from a file (or a folder of images) to single frames, and from frames to parts.

file (video_file.py) --index--> the time stamp of every frame --choose--> the wanted ones
     --decode in order--> upright RGB frames, handed on one by one
frames --preprocess_frames--> uint8 [F, J, size, size, 3]
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_mini_jax.data.media import video_file
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.errors import InputError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# One wrong bit in a time stamp makes a clip last for years; one frame a second would never end.
LONGEST_HOURS = 24
LONGEST_FRAME_HOURS = 1 / 6


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video to read; give exactly one of `fps` and `count`.

    The number of frames n is `count`, or `fps` times the length; at least one, and at most
    `max_frames` and the number of frames in the video. `rule` chooses them:

    - "time_stamps": every frame once if n is all frames, as in slides that last longer
      than a second; else the frame on screen in the middle of each of n equal spans of time, which
      is also right for variable frame rates.
    - "release": `release_frame_indices(total, n)`, where n uses the average frame rate.

    The release has `fps=1`, with max_frames 180 in its model worker, 1000 in MVBench and MLVU, and
    none elsewhere; its training uses `count=8`.
    """

    fps: float | None = None  # frames a second
    count: int | None = None  # frames in all
    max_frames: int | None = None  # more are spread evenly; None: no limit
    rule: str = "time_stamps"  # or "release"

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.count is None):
            raise InputError(
                f"Frame sampling has fps {self.fps} and count {self.count}; give exactly one."
            )
        if self.rule not in ("time_stamps", "release"):
            raise InputError(
                f'Frame sampling has rule {self.rule!r}; use "time_stamps" or "release".'
            )
        for name, value in (("fps", self.fps), ("count", self.count), ("max", self.max_frames)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"Frame sampling has {name} {value}; give a number above 0.")

    def number(self, total: int, by_rate: float) -> int:
        """How many of `total` frames are read, where `fps` would make it `by_rate`; never 0."""
        n = by_rate if self.count is None else self.count
        return max(1, int(min(n, total, self.max_frames or total)))


def release_frame_indices(total_frames: int, count: int) -> np.ndarray:
    """int64 [count]: the middles of `count` equal pieces, rounded as the release rounds them.

    release_frame_indices(90, 3) gives 15, 44, 74: Python's round sends halves to the even number.
    """
    if total_frames < 1 or count < 1:
        raise InputError(f"Cannot choose {count} of {total_frames} frames; both must be above 0.")
    piece = (total_frames - 1) / count
    edges = [round(piece * i) for i in range(count + 1)]
    return np.array([(a + b) // 2 for a, b in pairwise(edges)])


class VideoFrames(Iterator[np.ndarray]):
    """The sampled frames of a video, read as they are taken; `len` is how many there are in all."""

    def __init__(self, count: int, frames: Iterator[np.ndarray]):
        self._count, self._frames = count, frames

    def __len__(self) -> int:
        return self._count

    def __next__(self) -> np.ndarray:
        return next(self._frames)


def read_video(
    path: Path | str, sampling: FrameSampling, *, max_pixels: int | None = None
) -> VideoFrames:
    """The sampled frames in order, each uint8 [H, W, 3], upright.

    A folder is a video whose frames are its images, sorted as people count (2 before 10). It has
    no times: `fps` then takes every image (the release takes them all), and `count` and
    `max_frames` spread evenly by the release's rule.

    Raises InputError at once for what is not a whole video with at least one frame of at most
    `max_pixels` pixels, and while iterating for a frame that cannot be decoded.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path, sampling)
        is_file, exists = path.is_file(), path.exists()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, no permission for the folder
        raise InputError(f"Cannot open the video {path}: {error}; check the path.") from error
    if not is_file:
        problem = "it is not a file" if exists else "there is no such file"
        raise InputError(f"Cannot open the video {path}: {problem}; check the path.")
    index = video_file.read_index(path, max_pixels)
    stamps, time_base, rate = index.stamps, index.time_base, index.rate
    total = len(stamps) - 1
    hours = max(float((stamps[-1] - stamps[0]) * time_base), total / rate) / 3600
    if hours > min(LONGEST_HOURS, total * LONGEST_FRAME_HOURS):
        raise InputError(
            f"The video {path} says that its {total} frames last {hours:,.1f} hours; the limit is"
            f" {LONGEST_HOURS} hours, 10 minutes a frame. Repair its time stamps, or cut it."
        )
    wanted = _choose(stamps, time_base, rate, sampling)
    return VideoFrames(len(wanted), video_file.decode(path, index, wanted))


def _read_folder(folder: Path, sampling: FrameSampling) -> VideoFrames:
    def natural(path: Path) -> list[Any]:  # digits and other text alternate, so types never mix
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    names = [p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    pictures = sorted((p for p in names if not p.name.startswith(".")), key=natural)
    if not pictures:
        raise InputError(
            f"The folder {folder} holds no images ({', '.join(PICTURE_SUFFIXES)}); a video is a"
            " file, or a folder of frames."
        )
    total = len(pictures)
    count = sampling.number(total, total)
    wanted = range(total) if count == total else release_frame_indices(total, count)
    return VideoFrames(count, (np.asarray(load_image(pictures[i])) for i in wanted))


def _choose(
    stamps: list[int], time_base: Fraction, rate: float, sampling: FrameSampling
) -> list[int]:
    """Time stamps of the wanted frames; `stamps` has the end of the last frame appended."""
    total = len(stamps) - 1
    if sampling.rule == "release":
        by_rate = total // (rate / (sampling.fps or 1))  # the release divides with // too
        return [stamps[i] for i in release_frame_indices(total, sampling.number(total, by_rate))]
    length = stamps[-1] - stamps[0]
    # The small addition: stamps rounded to milliseconds make 30 frames at 30 per second 0.999 s.
    by_rate = float(length * time_base) * (sampling.fps or 1) + 0.01
    count = sampling.number(total, by_rate)
    if count == total:
        return stamps[:-1]
    return [stamps[0] + length * (2 * i + 1) // (2 * count) for i in range(count)]


def preprocess_frames(frames: Iterable[np.ndarray], cfg: ImageConfig, *, resize: str) -> np.ndarray:
    """uint8 [F, J, size, size, 3] from frames uint8 [H, W, 3].

    resize "bicubic": every frame is an image, its aspect ratio kept as `cfg` says.
    resize "nearest": first straight to size x size by nearest neighbour, so the aspect ratio is
      lost, as in the release for video files (not for folders of frames: those are images).
    """
    if resize not in ("nearest", "bicubic"):
        raise InputError(f'resize is {resize!r}; use "nearest" or "bicubic".')
    parts = [
        preprocess(
            Image.fromarray(_nearest(frame, cfg.size) if resize == "nearest" else frame), cfg
        )
        for frame in frames
    ]
    if not parts:
        raise InputError("There are no frames to preprocess; a video needs at least one.")
    return np.stack(parts)


def _nearest(frame: np.ndarray, size: int) -> np.ndarray:
    """torch's interpolate(mode="nearest"): index floor(i * scale), the scale in float32."""

    def indices(length: int) -> np.ndarray:
        scale = np.float32(length) / np.float32(size)
        floors = np.floor(np.arange(size, dtype=np.float32) * scale).astype(np.int64)
        return np.minimum(floors, length - 1)

    return frame[indices(frame.shape[0])[:, None], indices(frame.shape[1])[None, :]]
