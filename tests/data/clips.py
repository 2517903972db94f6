"""Video clips that the tests write: of known greys, of noise that moves, of sound alone."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from llava_mini_jax.data.media.video import FrameSampling

ALL = FrameSampling(count=1000)
# Decoding is lossy: a grey level is recognised to this much. Frames are LEVEL_STEP apart.
LEVEL_TOLERANCE = 4
LEVEL_STEP = 10


def make_video(
    path: Path, stamps, *, rate: Any = 10, sound=False, codec="mpeg4", pixels="yuv420p"
) -> Path:
    """Frame i is shown from stamps[i] (in units of 1 / rate), in the grey 10 * i."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.time_base = Fraction(1, rate)
        if not codec.startswith("libvpx"):
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        if sound:
            audio = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=8000)
        for i, stamp in enumerate(stamps):
            picture = np.full((48, 64, 3), LEVEL_STEP * i % 250, np.uint8)
            picture[:12, :16] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            _add_silence(container, audio)
    return path


def levels(frames) -> list[int]:
    """The number of each frame, from its grey."""
    greys = [float(frame[24, 40].mean()) for frame in frames]
    numbers = [round(grey / LEVEL_STEP) for grey in greys]
    assert all(
        abs(g - LEVEL_STEP * n) < LEVEL_TOLERANCE for g, n in zip(greys, numbers, strict=True)
    )
    return numbers


def moving_video(path: Path, codec: str, options: dict, stamps) -> Path:
    """Noise that moves: every frame needs the one before it.

    The same bytes each time, so that what damage does to them is the same: x264's rate control is
    not, and Matroska draws its ids at random.
    """
    if codec == "libx264":
        options = {"qp": "26", "threads": "1"} | options
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * i, axis=1), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(video: Path, path: Path, matrix) -> Path:
    """An mp4 file with another display matrix (a, b, c, d): how phones store portrait videos."""
    content = bytearray(video.read_bytes())
    start = content.index(b"tkhd") + 44
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        here = slice(start + place, start + place + 4)
        content[here] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def sound_alone(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=8000)
        _add_silence(container, audio)
    return path


def _add_silence(container, audio) -> None:
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
    silence.rate, silence.pts = 8000, 0
    container.mux(audio.encode(silence))
    container.mux(audio.encode())


def huge_gif(path: Path) -> Path:
    """60,000 pixels each way, it says; there are 8."""
    still = Image.new("RGB", (8, 8))
    still.save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")], duration=100)
    content = bytearray(path.read_bytes())
    content[6:10] = (60_000).to_bytes(2, "little") * 2
    path.write_bytes(content)
    return path


def damaged(video: Path, damage: str) -> Path:
    """The file itself, a fifth of it in the middle "noise", "zeros" or "gone"."""
    content = video.read_bytes()
    begin, end = len(content) * 2 // 5, len(content) * 3 // 5
    noise = np.random.default_rng(0).bytes(end - begin)
    middle = {"noise": noise, "zeros": bytes(end - begin), "gone": b""}[damage]
    video.write_bytes(content[:begin] + middle + content[end:])
    return video
