"""Films of strangers: a process of their own decodes them, and hands over finished frames.

    film, How --a line of JSON--> film_child.py --pipe: how many, then one by one--> frames
                                       |
          limits of memory and time: whatever FFmpeg does there ends this film's request alone

A process lives as long as its frames are taken, and is a frame or a few ahead, as many as the pipe
holds: so a film's length costs no memory here.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.data.media.images import ImageConfig
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.film_child import FRAME
from llava_mini_jax.serving.limits import Limits

_CHILD = Path(__file__).with_name("film_child.py")
_PATIENCE = 4  # times its processor time: a frame may have to wait for a busy machine
_LONGEST_LINE = 1000
# One thread and one heap: those of many cores alone would pass the limit.
_ALONE = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class How:
    """How a film becomes frames."""

    images: ImageConfig
    sampling: FrameSampling
    resize: str  # `preprocess_frames`'
    limits: Limits


def count_frames(path: Path, how: How, name: str) -> int:
    """How many frames will be read. Raises ApiError, about `name`, for what is no whole film."""
    with _child(path, how, wanted=False) as child:
        return _header(child, how, name)


def read_frames(path: Path, how: How, name: str) -> Iterator[np.ndarray]:
    """The frames, uint8 [J, size, size, 3], read as they are taken; ApiError as above."""
    shape = (how.images.parts, how.images.size, how.images.size, 3)
    size = int(np.prod(shape))
    with _child(path, how, wanted=True) as child:
        for _ in range(_header(child, how, name)):
            if _take(child, 1, how) != FRAME:
                raise _refused(child, how, name)
            pixels = _take(child, size, how)
            if len(pixels) < size:
                raise _refused(child, how, name)
            yield np.frombuffer(pixels, np.uint8).reshape(shape)


def _header(child: subprocess.Popen, how: How, name: str) -> int:
    first = _take(child, 1, how)
    if first != b"{":
        raise _refused(child, how, name)
    return json.loads(first + _line(child, how))["frames"]


@contextlib.contextmanager
def _child(path: Path, how: How, *, wanted: bool) -> Iterator[subprocess.Popen]:
    given = {
        "path": str(path),
        "wanted": wanted,
        "images": dataclasses.asdict(how.images),
        "sampling": dataclasses.asdict(how.sampling),
        "resize": how.resize,
        "pixels": how.limits.image_pixels,
        "megabytes": how.limits.film_megabytes,
        "seconds": how.limits.film_seconds,
    }
    # -P: modules beside the script must not stand for those of the standard library.
    child = subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the server
        env={**os.environ, **_ALONE, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(given).encode() + b"\n")
            child.stdin.close()
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _take(child: subprocess.Popen, size: int, how: How) -> bytes:
    """So many bytes; fewer where the process ends, as it does when it takes too long."""
    return _waiting(child, how, lambda out: out.read(size))


def _line(child: subprocess.Popen, how: How) -> bytes:
    return _waiting(child, how, lambda out: out.readline(_LONGEST_LINE))


def _waiting(child: subprocess.Popen, how: How, read: Any) -> bytes:
    timer = threading.Timer(_PATIENCE * how.limits.film_seconds, child.kill)
    timer.daemon = True
    timer.start()
    try:
        return read(child.stdout)
    finally:
        timer.cancel()


def _refused(child: subprocess.Popen, how: How, name: str) -> ApiError:
    """The sentence about a process that has said why there is no frame, or has ended."""
    line = _line(child, how)
    reason = "unreadable"
    if line.endswith(b"\n"):
        reason = json.loads(line)["error"]
    elif -child.wait() in (signal.SIGXCPU, signal.SIGKILL):
        reason = "time"
    limits = how.limits
    told = {
        "unreadable": "it is not a complete video with a video track and at least one frame; send"
        " it as mp4, webm, mov, mkv, avi, mpeg, flv, asf, ogg or gif",
        "large": f"its frames have more than {limits.image_pixels:,} pixels; make it smaller",
        "memory": f"decoding it needs more than {limits.film_megabytes:,} MB; make it smaller",
        "time": f"a frame of it takes more than {limits.film_seconds:g} s; make it smaller",
    }
    return ApiError(400, f"{name} cannot be read: {told[reason]}", param="video_url")
