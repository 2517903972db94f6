"""Videos that are broken, odd or none: frames or one sentence that names the file, never a hang."""

import os

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini_jax.data.media import video_file
from llava_mini_jax.data.media.video import FrameSampling, read_video
from llava_mini_jax.errors import InputError
from tests.data.clips import (
    ALL,
    damaged,
    huge_gif,
    levels,
    make_video,
    moving_video,
    sound_alone,
)


def read(path) -> int:
    return sum(1 for _ in read_video(path, ALL))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("kept", [0, 0.01, 0.3, 0.6])
def test_truncated_files(suffix, kept, folder):
    name = "mkv" if suffix == "webm" else suffix
    content = make_video(folder / f"whole.{name}", range(40)).read_bytes()
    path = folder / f"cut_{kept}.{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=str(path)):
        read_video(path, ALL)


def test_truncated_behind_its_index(folder, tmp_path):
    with av.open(str(folder / "front.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(20):
            picture = noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = (folder / "front.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert read(folder / "front.mp4") == 20
    path = tmp_path / "cut.mp4"
    for kept in (0.5, 0.9, 0.99):
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(InputError, match="ends"):
            read_video(path, ALL)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_no_frames(suffix, folder):
    for stamps, sound in [([], True), ([], False)]:
        path = make_video(folder / f"nothing_{sound}.{suffix}", stamps, sound=sound)
        with pytest.raises(InputError, match=str(path)):
            read_video(path, ALL)
    with pytest.raises(InputError, match="no video in it"):
        read_video(sound_alone(folder / f"sound.{suffix}"), ALL)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        audio, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        silence.rate = 8000
        container.mux(audio.encode(silence))
        container.mux(audio.encode())
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
    with pytest.raises(InputError, match="no video in it"):
        read_video(tmp_path / "song.mp4", ALL)


def test_endless_time_stamps(folder):
    path = make_video(folder / "endless.mkv", [0, 1, 10 * 3600 * 10])
    with pytest.raises(InputError, match=r"3 frames last 10\.0 hours"):
        read_video(path, FrameSampling(fps=1))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("damage", ["noise", "zeros", "gone"])
def test_broken_in_the_middle(suffix, damage, folder):
    """An answer from what can be seen, or one sentence."""
    path = moving_video(folder / f"{damage}.{suffix}", "libx264", {"g": "12", "bf": "2"}, range(60))
    damaged(path, damage)
    for sampling in (ALL, FrameSampling(fps=1)):
        try:
            frames = read_video(path, sampling)
            assert len(list(frames)) == len(frames)
        except InputError as error:
            assert str(path) in str(error)


def test_huge_dimensions(folder, video, monkeypatch):
    path = huge_gif(folder / "huge.gif")
    with pytest.raises(InputError, match=str(path)):
        read(path)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(InputError, match="frames of 64 x 48 pixels, the limit is 3,071"):
        read_video(video, ALL)


def test_sound_beside_the_frames_does_no_harm(folder):
    path = make_video(folder / "with_sound.mp4", range(6), sound=True)
    assert levels(read_video(path, ALL)) == list(range(6))


def test_not_videos(tmp_path, video):
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    # FFmpeg would follow these to other files or addresses.
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {video}\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty_folder").mkdir()
    broken = tmp_path / "broken_frames"
    broken.mkdir()
    (broken / "1.jpg").write_bytes(b"")
    names = ["page.mp4", "picture.png", "list.m3u8", "list.mp4", "pipe.mp4", "missing.mp4"]
    names += ["empty_folder", "broken_frames", "x" * 5000, "nul\0byte", "concat:a|b"]
    for name in names:
        with pytest.raises(InputError):
            read(tmp_path / name)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=8),
    st.sampled_from(["mp4", "mkv"]),
)
def test_damaged_videos_give_frames_or_an_input_error(folder, tmp_path, flips, suffix):
    source = folder / f"seed.{suffix}"
    if not source.exists():
        make_video(source, range(6))
    content = bytearray(source.read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        frames = list(read_video(path, FrameSampling(count=4)))
    except InputError:
        return
    assert frames and all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames)
