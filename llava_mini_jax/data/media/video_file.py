"""Video files, by PyAV: an index without decoding, then the wanted frames.

    file --read_index--> when each frame is shown, and which packets are key frames
    wanted time stamps --decode--> packets:  K . . . . K . . . . K . . . . K . . . .
                                   decoded:  x x x     .         x x x x x x x        x: up to the
                                   wanted:         1                       2 3        wanted frame
         --> upright RGB frames, handed on one by one

The file is read twice: once to learn how many frames there are and when each is shown (headers do
not know, frame rates vary), and once to decode. No more than one decoded frame is held, so the
length of a video costs time but no memory.

What stands between a wanted frame and the key frame before the next one is read, but not decoded.
Packets are counted rather than sought in the file: exact in every container, and what it reads in
excess is little beside decoding (figures in docs/video.md).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from llava_mini_jax.data.media.image_file import MAX_PIXELS, TooLargeError
from llava_mini_jax.errors import InputError

# Only containers of video, and only local files: FFmpeg would otherwise follow playlists to other
# files and addresses, and would open images and subtitles as videos of one frame.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
_NEIGHBOURS = 5  # frames


@dataclass(frozen=True)
class Index:
    """What a video file holds, in units of `time_base` seconds."""

    stamps: list[int]  # of all frames in the order they are shown, and the end of the last one
    time_base: Fraction
    rate: float  # frames per second on average
    keys: list[tuple[int, int]]  # (time stamp, number of the packet) of key frames; [] if unsure


def read_index(path: Path, max_pixels: int | None = None) -> Index:
    """The index of a file; InputError where it is no whole video with at least one frame, and
    TooLargeError where its frames have more than `max_pixels` pixels (None: MAX_PIXELS)."""
    try:
        return _index(path, max_pixels or MAX_PIXELS)
    except InputError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(
        f"Cannot read the video {path}: {reason}; expected a whole file in one of the formats"
        f" {_CONTAINERS}. Copy it again, or convert it to mp4."
    )


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


def _index(path: Path, max_pixels: int) -> Index:
    container, stream = _open(path)
    with container:
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise TooLargeError(
                f"Cannot read the video {path}: frames of {width} x {height} pixels, the limit is"
                f" {max_pixels:,} in all; make it smaller."
            )
        shown, keys, end = _packets(path, container, stream)
        # These two families declare their length, so a file cut short gives itself away.
        declared = (container.duration or 0) / av.time_base
        missing = declared - end if container.format.name.startswith(("mov", "matroska")) else 0
        if missing > max(0.5, 0.05 * declared):
            raise InputError(
                f"The video {path} ends after {end:.1f} of {declared:.1f} seconds; copy or"
                " download it again."
            )
        if not shown:
            raise InputError(f"The video {path} has 0 frames; copy or download it again.")
        shown.sort()
        stamps = [stamp for stamp, _ in shown]
        stamps.append(stamps[-1] + _last_duration(shown))
        length = (stamps[-1] - stamps[0]) * stream.time_base
        rate = float(stream.average_rate or (len(shown) / length if length else 1))
        return Index(stamps, stream.time_base, rate, keys)


def _packets(
    path: Path, container: Any, stream: Any
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], float]:
    """Of each frame (time stamp, duration or 0), `Index.keys`, and the end of all streams in
    seconds: of sound too, which may go on for longer."""
    shown: list[tuple[int, int]] = []
    keys, end = [], 0.0
    number, sure = -1, True
    for packet in container.demux():
        number += packet.stream is stream
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:  # the empty packet at the end
            continue
        end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        if packet.is_keyframe:
            keys.append((stamp, number))
        sure &= packet.pts is not None
        if packet.is_discard:
            continue
        if packet.is_corrupt:
            raise InputError(
                f"The video {path} is damaged or ends early, after {len(shown)} frames; copy"
                " or download it again."
            )
        shown.append((stamp, packet.duration or 0))
    return shown, keys if sure else [], end


def _last_duration(shown: Sequence[tuple[int, int]]) -> int:
    """How long the last frame is shown: as its packet says, or else as long as its neighbours.

    FLV and ASF have no durations, and those of MPEG-TS and Matroska are made of a nominal frame
    rate: a packet's word counts if the durations of most frames before it are those until the next.
    """
    gaps = [after - before for (before, _), (after, _) in pairwise(shown)]
    said = [duration for _, duration in shown]
    if not gaps:
        return said[-1]
    true = sum(abs(gap - one) <= max(1, gap // 10) for gap, one in zip(gaps, said, strict=False))
    if said[-1] and 2 * true >= len(gaps):
        return said[-1]
    return int(median(gaps[-_NEIGHBOURS:]))


def decode(path: Path, index: Index, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """What is on screen at each wanted time stamp (ascending): the last frame not after it.

    Raises InputError where a frame cannot be decoded. uint8 [H, W, 3], upright.
    """
    given = 0
    if index.keys:
        try:
            for frame in _decode_parts(path, index, wanted):
                given += 1
                yield frame
        except (FFmpegError, OSError, ValueError):
            pass  # decoding through may get over it, and says what is wrong if not
    if given < len(wanted):
        yield from _decode_through(path, wanted[given:])


def _decode_parts(path: Path, index: Index, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """`decode` from key frames on; ends early where a frame does not come out as it should."""
    shown = index.stamps[:-1]
    goals = [shown[max(0, bisect_right(shown, w) - 1)] for w in wanted]
    keys = sorted(index.keys)
    starts = [keys[max(0, bisect_right(keys, (goal, float("inf"))) - 1)] for goal in goals]
    given, skipped = 0, False
    container, stream = _open(path)
    with container:
        for number, packet in enumerate(container.demux(stream)):
            if number < starts[given][1]:
                skipped = True
                continue
            if skipped:
                stream.codec_context.flush_buffers()
                skipped = False
            for frame in packet.decode():
                stamp = frame.dts if frame.pts is None else frame.pts
                if stamp is None or stamp < goals[given]:
                    continue  # among them what refers to frames that were not decoded
                if stamp > goals[given]:
                    return
                while goals[given] == stamp:
                    given += 1
                    yield _upright(frame)
                    if given == len(goals):
                        return


def _decode_through(path: Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """`decode` of every frame in turn: right also where time stamps or key frames lie."""
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
