"""Videos: from a file (or a folder of pictures) to single frames, and from frames to parts.

    file --demux--> the time stamp of every frame --choose--> the wanted ones
         --decode in order--> upright RGB frames, handed on one by one
    frames --preprocess_frames--> uint8 [F, J, size, size, 3]

The file is read twice: once without decoding, to learn how many frames there are and when each is
shown (headers do not know, frame rates vary), and once to decode. No more than one decoded frame is
held, so the length of a video costs time but no memory.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from llava_mini_jax.data.images import MAX_PIXELS, ImageConfig, load_image, preprocess
from llava_mini_jax.errors import InputError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# One wrong bit in a time stamp makes a clip last for years; one frame a second would never end.
LONGEST_HOURS = 24
LONGEST_FRAME_HOURS = 1 / 6
# Only containers of video, and only local files: FFmpeg would otherwise follow playlists to other
# files and addresses, and would open pictures and subtitles as videos of one frame.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are read; exactly one of `fps` and `count` is given.

    The chosen number of frames n is `count` (at most the number of frames there are), or `fps`
    times the length; at most `max_frames`, at least one. Where they lie:
      rule "time_stamps": what is on screen in the middle of each of n equal spans of time; right
        for variable frame rates too.
      rule "release": `release_frame_indices(total, n)`, n counted with the average frame rate.
    For the release, `fps=1`: max_frames is 180 in its model worker, 1000 in MVBench and MLVU, none
    elsewhere; its training uses `count=8`.
    """

    fps: float | None = None
    count: int | None = None
    max_frames: int | None = None
    rule: str = "time_stamps"

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
            if value is not None and not value > 0:
                raise InputError(f"Frame sampling has {name} {value}; it must be above 0.")

    def number(self, total: int, by_rate: float) -> int:
        """How many of `total` frames are read, where `fps` would make it `by_rate`; never 0."""
        n = by_rate if self.count is None else min(self.count, total)
        return max(1, int(n if self.max_frames is None else min(n, self.max_frames)))


def release_frame_indices(total_frames: int, count: int) -> np.ndarray:
    """int64 [count]: the middles of `count` equal pieces, rounded as the release rounds them.

    release_frame_indices(90, 3) gives 15, 44, 74: Python's round sends halves to the even number.
    """
    if total_frames < 1 or count < 1:
        raise InputError(f"Cannot choose {count} of {total_frames} frames; both must be above 0.")
    piece = (total_frames - 1) / count
    edges = [round(piece * i) for i in range(count + 1)]
    return np.array([(a + b) // 2 for a, b in pairwise(edges)])


def read_video(path: Path | str, sampling: FrameSampling) -> Iterator[np.ndarray]:
    """The sampled frames in order, each uint8 [H, W, 3], upright.

    A folder is a video whose frames are its pictures, sorted as people count (2 before 10). It has
    no times: `fps` then takes every picture (the release takes them all), and `count` and
    `max_frames` spread evenly by the release's rule.

    Raises InputError at once for what is not a whole video with at least one frame, and while
    iterating for a frame that cannot be decoded.
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
    try:
        stamps, time_base, rate = _index(path)
    except InputError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    total = len(stamps) - 1
    hours = max(float((stamps[-1] - stamps[0]) * time_base), total / rate) / 3600
    if hours > min(LONGEST_HOURS, total * LONGEST_FRAME_HOURS):
        raise InputError(
            f"The video {path} says that its {total} frames last {hours:,.1f} hours; the limit is"
            f" {LONGEST_HOURS} hours, 10 minutes a frame. Repair its time stamps, or cut it."
        )
    return _decode(path, _choose(stamps, time_base, rate, sampling))


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(
        f"Cannot read the video {path}: {reason}; expected a whole file in one of the formats"
        f" {_CONTAINERS}. Copy it again, or convert it to mp4."
    )


def _read_folder(folder: Path, sampling: FrameSampling) -> Iterator[np.ndarray]:
    def natural(path: Path) -> list[Any]:  # digits and other text alternate, so types never mix
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    names = [p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    pictures = sorted((p for p in names if not p.name.startswith(".")), key=natural)
    if not pictures:
        raise InputError(
            f"The folder {folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}); a video is a"
            " file, or a folder of frames."
        )
    total = len(pictures)
    count = sampling.number(total, total)
    wanted = range(total) if count == total else release_frame_indices(total, count)
    return (np.asarray(load_image(pictures[i])) for i in wanted)


def _open(path: Path) -> Any:
    # PyAV 19 dropped the argument: it never fails on metadata that is not UTF-8.
    lenient: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    container = av.open(f"file:{path.resolve()}", options=_OPTIONS, **lenient)
    covers = Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & covers]
    if not streams or streams[0].codec_context is None:
        container.close()
        what = "no video in it" if not streams else "its codec is not known"
        raise InputError(f"Cannot read the video {path}: {what}; give a file with a video track.")
    return container, streams[0]


def _index(path: Path) -> tuple[list[int], Fraction, float]:
    """Time stamps of all frames in the order they are shown, their unit, and frames per second."""
    container, stream = _open(path)
    with container:
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise InputError(
                f"Cannot read the video {path}: frames of {width} x {height} pixels, the limit is"
                f" {MAX_PIXELS:,} in all; make it smaller."
            )
        stamps, last_duration, end = [], 0, 0.0
        for packet in container.demux():
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:  # the empty packet at the end
                continue
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise InputError(
                    f"The video {path} is damaged or ends early, after {len(stamps)} frames; copy"
                    " or download it again."
                )
            stamps.append(stamp)
            last_duration = packet.duration or last_duration
        # These two families declare their length, so a file cut short gives itself away.
        declared = (container.duration or 0) / av.time_base
        missing = declared - end if container.format.name.startswith(("mov", "matroska")) else 0
        if missing > max(0.5, 0.05 * declared):
            raise InputError(
                f"The video {path} ends after {end:.1f} of {declared:.1f} seconds; copy or"
                " download it again."
            )
        if not stamps:
            raise InputError(f"The video {path} has 0 frames; copy or download it again.")
        stamps.sort()
        length = (stamps[-1] - stamps[0] + last_duration) * stream.time_base
        rate = float(stream.average_rate or (len(stamps) / length if length else 1))
        return [*stamps, stamps[-1] + last_duration], stream.time_base, rate


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
    return [stamps[0] + length * (2 * i + 1) // (2 * count) for i in range(count)]


def _decode(path: Path, wanted: list[int]) -> Iterator[np.ndarray]:
    """What is on screen at each wanted time stamp (ascending): the last frame not after it."""
    given, shown = 0, None
    try:
        container, stream = _open(path)
        with container:
            for frame in container.decode(stream):
                stamp = frame.dts if frame.pts is None else frame.pts
                if stamp is None:
                    continue
                while given < len(wanted) and wanted[given] < stamp:
                    given += 1
                    yield _upright(frame if shown is None else shown)
                shown = frame
                while given < len(wanted) and wanted[given] == stamp:
                    given += 1
                    yield _upright(frame)
                if given == len(wanted):
                    return
    except InputError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if shown is None:
        raise InputError(f"No frame of the video {path} can be decoded; convert it to mp4.")
    for _ in wanted[given:]:
        yield _upright(shown)


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the file says (phones store portrait videos on their side)."""
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))


def preprocess_frames(frames: Iterable[np.ndarray], cfg: ImageConfig, *, resize: str) -> np.ndarray:
    """uint8 [F, J, size, size, 3] from frames uint8 [H, W, 3].

    resize "bicubic": every frame is a picture, its aspect ratio kept as `cfg` says.
    resize "nearest": first straight to size x size by nearest neighbour, so the aspect ratio is
      lost, as in the release for video files (not for folders of frames: those are pictures).
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
