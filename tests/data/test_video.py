"""Videos: the release's frames exactly, the right moment otherwise."""

import dataclasses
import itertools
import json
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.data.media import video_file
from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_mini_jax.data.media.video import (
    FrameSampling,
    _choose,
    preprocess_frames,
    read_video,
    release_frame_indices,
)
from llava_mini_jax.errors import InputError
from tests import golden_data
from tests.data.clips import ALL, LEVEL_STEP, levels, make_video, moving_video, turned

GOLDEN = golden_data.folder("preprocess")
RELEASE_MODES = {
    "cli": FrameSampling(fps=1, rule="release"),
    "worker": FrameSampling(fps=1, max_frames=180, rule="release"),
    "mvbench_mlvu": FrameSampling(fps=1, max_frames=1000, rule="release"),
    "train": FrameSampling(count=8, rule="release"),
}


def make_cfg(aspect="pad", grid=1, size=336):
    return ImageConfig(
        size=size,
        aspect=aspect,
        grid=grid,
        split="split_then_pad",
        repeat_whole=False,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resample="bicubic",
    )


# --- The release's frames -------------------------------------------------------------------------


def test_frame_choice_equals_the_release():
    rows = json.loads((GOLDEN / "frame_sampling.json").read_text())["rows"]
    for row in rows:
        total, rate, expected = row["total_frames"], row["avg_fps"], row["indices"]
        stamps = _choose(list(range(total + 1)), Fraction(1), rate, RELEASE_MODES[row["mode"]])
        if expected is None:  # shorter than a second: the release crashes, here one frame is read
            assert len(stamps) == 1
        else:
            assert release_frame_indices(total, row["num_frames"]).tolist() == expected
            assert stamps == expected
    for total, count in [(0, 1), (5, 0)]:
        with pytest.raises(InputError, match=f"{count} of {total}"):
            release_frame_indices(total, count)


@pytest.mark.parametrize(
    ("total", "rate", "count"),
    [
        (29, 10.0, 2),
        (59, 30.0, 1),
        (315, 30000 / 1001, 10),  # 10.51 seconds
        (899, 29.97, 29),  # 29.997 seconds
        (11, 1.1, 9),  # 10 seconds, but Python's 11 // 1.1 is 9
    ],
)
def test_the_release_counts_whole_seconds(total, rate, count):
    stamps = list(range(total + 1))
    chosen = _choose(stamps, Fraction(1), rate, FrameSampling(fps=1, rule="release"))
    assert chosen == release_frame_indices(total, count).tolist()


def test_of_a_file_too_the_release_counts_whole_seconds(folder):
    path = make_video(folder / "nearly_two_seconds.mp4", range(19))
    assert levels(read_video(path, FrameSampling(fps=1, rule="release"))) == [9]


def test_nearest_frames_equal_the_release():
    path = GOLDEN / "video_frames.npz"
    source, frames = np.load(path)["source"], golden_data.pixels(path, "frames")
    sampled = source[release_frame_indices(len(source), len(frames.array))]
    parts = preprocess_frames(sampled, make_cfg(grid=2), resize="nearest")
    assert parts.shape == (len(sampled), 5, 336, 336, 3) and parts.dtype == np.uint8
    shown = parts.transpose(0, 1, 4, 2, 3)
    whole = frames.seen(shown[:, -1])
    np.testing.assert_array_equal(whole.transpose(0, 2, 3, 1), frames.array)
    first = golden_data.pixels(path, "hd_first_frame")
    np.testing.assert_array_equal(first.seen(shown[0]), first.array)


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.mp4"))])
def test_real_video_equals_the_release(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    path = GOLDEN / golden["file"]
    decoded = list(read_video(path, ALL))
    sampled = list(read_video(path, FrameSampling(fps=1, rule="release")))
    assert len(decoded) == golden["total_frames"] and len(sampled) == golden["num_frames"]
    for frame, index in zip(sampled, golden["indices"], strict=True):
        np.testing.assert_array_equal(frame, decoded[index])
    saved = [sampled[i] for i in golden["saved_frames"]]
    parts = preprocess_frames(saved, make_cfg(), resize="nearest")[:, 0].transpose(0, 3, 1, 2)
    expected = golden_data.pixels(GOLDEN / f"{name}_frames.npz", "frames")
    seen = expected.seen(parts).transpose(0, 2, 3, 1)
    # Decoders and colour conversions differ by a few grey levels.
    assert np.abs(seen.astype(int) - expected.array).max() <= 4


def test_bicubic_keeps_the_aspect_ratio():
    frame = np.zeros((48, 64, 3), np.uint8)
    padded = preprocess_frames([frame], make_cfg(size=64), resize="bicubic")
    assert padded[0, 0, 0, 0].tolist() == [122, 116, 104] and padded[0, 0, 32, 32].max() == 0
    stretched = preprocess_frames([frame], make_cfg(size=64), resize="nearest")
    assert stretched.max() == 0
    for frames, resize, reason in [([], "nearest", "no frames"), ([frame], "area", "area")]:
        with pytest.raises(InputError, match=reason):
            preprocess_frames(frames, make_cfg(), resize=resize)


# --- The right moment -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov", "ts"])
def test_steady_video(suffix, folder):
    path = make_video(folder / f"formats.{suffix}", range(20))
    assert levels(read_video(path, ALL)) == list(range(20))
    # Middles of spans of 0.2 seconds, and of ten pieces of 1.9 frames.
    assert levels(read_video(path, FrameSampling(fps=5))) == list(range(1, 20, 2))
    release = FrameSampling(fps=1, rule="release")
    expected = release_frame_indices(20, 2).tolist()
    if suffix != "ts":  # mpegts declares no average rate; FFmpeg guesses it from few frames
        assert levels(read_video(path, release)) == expected


def test_variable_frame_rate_goes_by_time(folder):
    # Ten frames in the first second, then one image that stands for nine.
    path = make_video(folder / "variable.mkv", [*range(10), 95])
    shown = levels(read_video(path, FrameSampling(count=4)))
    assert shown == [9, 9, 9, 9]  # by index it would be 1, 4, 6, 9
    # 9.6 seconds give nine frames, 1.07 seconds apart, the first in the middle of its span
    assert levels(read_video(path, FrameSampling(fps=1))) == [5, *[9] * 8]


SLIDES = {  # container: codec, pixels, and whether it says how long its last frame is shown
    "mp4": ("mpeg4", "yuv420p", True),
    "gif": ("gif", "gray", True),
    "mkv": ("mpeg4", "yuv420p", False),
    "webm": ("libvpx-vp9", "yuv420p", False),
    "flv": ("flv1", "yuv420p", False),
    "ts": ("libx264", "yuv420p", False),
    "wmv": ("wmv2", "yuv420p", False),
}


@pytest.mark.parametrize("suffix", SLIDES)
def test_frames_that_last_longer_than_a_second(suffix, folder):
    codec, pixels, says = SLIDES[suffix]
    stamps = [0, 100, 200, 300, 400, 500]  # tenths of a second
    path = make_video(folder / f"slides.{suffix}", stamps, codec=codec, pixels=pixels)
    everything = [0, 1, 2, 3, 4, 5]
    for sampling in (
        FrameSampling(fps=1),
        FrameSampling(fps=1, max_frames=6),
        FrameSampling(fps=30, max_frames=1000),
        FrameSampling(count=6),
        ALL,
    ):
        frames = read_video(path, sampling)
        assert len(frames) == 6 and levels(frames) == everything
    # PyAV writes a tenth of a second for the last one, where the container has a place for it.
    assert levels(read_video(path, FrameSampling(count=3))) == ([0, 2, 4] if says else [1, 3, 5])
    capped = FrameSampling(fps=1, max_frames=4)
    assert levels(read_video(path, capped)) == ([0, 1, 3, 4] if says else [0, 2, 3, 5])


def test_the_last_frame_lasts_as_long_as_its_neighbours(folder):
    # Half a minute that moves, then slides of 6 seconds: the neighbours are slides.
    stamps = [*range(0, 30), *range(30, 300, 60)]
    path = make_video(folder / "talk.flv", stamps, codec="flv1")
    index = video_file.read_index(path)
    assert (index.stamps[-1] - index.stamps[-2]) * index.time_base == 6
    still = make_video(folder / "still.flv", [0], codec="flv1")
    assert len(list(read_video(still, FrameSampling(fps=1)))) == 1
    # Of frames on two sides of a long one, most say how long they last.
    steady = make_video(folder / "steady.mkv", [*range(10), 95])
    index = video_file.read_index(steady)
    assert float((index.stamps[-1] - index.stamps[0]) * index.time_base) == pytest.approx(9.6)


def test_slides_of_different_lengths_are_weighed_by_time(folder):
    path = make_video(folder / "uneven.flv", [0, 100, 120, 140, 400, 500], codec="flv1")
    # 60 seconds: what is on screen at 15 and 45 of them; at 10, 30 and 50
    assert levels(read_video(path, FrameSampling(count=2))) == [3, 4]
    assert levels(read_video(path, FrameSampling(count=3))) == [1, 3, 5]


def test_number_of_frames(folder, video):
    short = make_video(folder / "short.mp4", range(5))
    still = make_video(folder / "still.mp4", range(1))
    for sampling in (FrameSampling(fps=1), FrameSampling(fps=1, rule="release")):
        assert len(list(read_video(short, sampling))) == 1
        assert len(list(read_video(still, sampling))) == 1
    assert len(list(read_video(still, FrameSampling(count=8)))) == 1
    assert len(list(read_video(video, FrameSampling(fps=10, max_frames=3)))) == 3
    assert levels(read_video(short, FrameSampling(fps=1e9))) == list(range(5))  # not one more
    assert len(list(read_video(short, FrameSampling(fps=1e9, rule="release")))) == 5
    # One second, but 0.999 by Matroska's milliseconds.
    rounded = make_video(folder / "rounded.mkv", range(24), rate=24)
    assert len(list(read_video(rounded, FrameSampling(fps=3)))) == 3
    for fps, count, rule in [(None, None, "release"), (1, 1, "release"), (0, None, "release"),
                             (1, None, "middle"), (float("inf"), None, "release"),
                             (float("nan"), None, "release")]:  # fmt: skip
        with pytest.raises(InputError, match="Frame sampling"):
            FrameSampling(fps=fps, count=count, rule=rule)


@pytest.mark.parametrize(
    ("turn", "corner", "shape"),
    [
        # the display matrix of the file; where the white top left corner then is; height, width
        ((1, 0, 0, 1), (0, 0), (48, 64)),
        ((0, 1, -1, 0), (0, -1), (64, 48)),  # a quarter turn clockwise: phones
        ((-1, 0, 0, -1), (-1, -1), (48, 64)),
        ((0, -1, 1, 0), (-1, 0), (64, 48)),
    ],
)
def test_rotation(turn, corner, shape, video, folder):
    path = turned(video, folder / "rotated.mp4", turn)
    frame = next(iter(read_video(path, FrameSampling(count=1))))
    assert frame.shape == (*shape, 3)
    corners = {c: frame[c].min() > 200 for c in itertools.product((0, -1), (0, -1))}
    assert [c for c, white in corners.items() if white] == [corner]


def test_folder_of_pictures(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8), (i * LEVEL_STEP,) * 3).resize((64, 48)).save(
            tmp_path / f"frame_{i}.png"
        )
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._frame_0.png").write_text("what some systems leave behind")
    assert levels(read_video(tmp_path, FrameSampling(fps=1))) == list(range(12))
    chosen = release_frame_indices(12, 4).tolist()
    assert levels(read_video(tmp_path, FrameSampling(count=4))) == chosen
    assert levels(read_video(tmp_path, FrameSampling(fps=1, max_frames=4))) == chosen


def test_memory_does_not_grow_with_length(folder):
    path = make_video(folder / "long.mp4", range(400))
    list(read_video(path, FrameSampling(count=2)))  # what is loaded once
    tracemalloc.start()
    count = sum(1 for _ in read_video(path, ALL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400 and peak < 400 * 64 * 48 * 3 / 5


# --- Key frames -----------------------------------------------------------------------------------

CODECS = {
    "every frame is a key frame": ("k.mp4", "libx264", {"g": "1"}),
    "one second": ("s.mp4", "libx264", {"g": "10"}),
    "B-frames": ("b.mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "scenecut=0"}),
    "B-frames over key frames": (
        "open.mkv", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=8:scenecut=0"},
    ),
    "no key frames but the first": ("refresh.ts", "libx264", {"x264-params": "intra-refresh=1"}),
    "a stream": ("s.ts", "mpeg2video", {"g": "9", "bf": "2"}),
    "MPEG-4": ("m.mkv", "mpeg4", {"g": "7", "bf": "2"}),
    "no time stamps": ("m.avi", "mpeg4", {"g": "7", "bf": "2"}),
    "VP9": ("v.webm", "libvpx-vp9", {"g": "9", "deadline": "realtime", "cpu-used": "8"}),
    "one key frame": ("o.mp4", "libx264", {"g": "1000", "bf": "2"}),
}  # fmt: skip


@pytest.mark.parametrize("uneven", [False, True], ids=["steady", "variable rate"])
@pytest.mark.parametrize("name", CODECS)
def test_from_key_frames_on_gives_the_frames_of_decoding_through(name, uneven, folder):
    suffix, codec, options = CODECS[name]
    gaps = np.random.default_rng(1).integers(1, 9 if uneven else 2, 90)
    path = moving_video(folder / f"{uneven}_{suffix}", codec, options, np.cumsum(gaps).tolist())
    index = video_file.read_index(path)
    for sampling in (FrameSampling(fps=1), FrameSampling(count=3), FrameSampling(count=40), ALL):
        wanted = _choose(index.stamps, index.time_base, index.rate, sampling)
        through = list(video_file._decode_through(path, wanted))
        found = list(video_file.decode(path, index, wanted))
        assert len(through) == len(wanted)
        np.testing.assert_array_equal(found, through)
        if name in ("one second", "B-frames", "B-frames over key frames", "MPEG-4"):
            assert len(list(video_file._decode_parts(path, index, wanted))) == len(wanted)


@pytest.mark.parametrize("bframes", ["0", "2"])
def test_what_is_between_wanted_frames_and_key_frames_is_not_decoded(bframes, folder):
    options = {"g": "10", "bf": bframes, "x264-params": "scenecut=0"}
    path = moving_video(folder / f"between{bframes}.mp4", "libx264", options, range(100))
    sampling = FrameSampling(fps=0.2)  # frames 25 and 75
    expected = list(read_video(path, sampling))
    content, spoilt = bytearray(path.read_bytes()), 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.pts is None or any(k <= packet.pts / packet.time_base.denominator * 10 <= w
                                         for k, w in ((20, 31), (70, 81))):  # fmt: skip
                continue  # the decoder may be some frames behind
            assert packet.pos is not None
            content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
            spoilt += 1
    path.write_bytes(content)
    assert spoilt > 70
    np.testing.assert_array_equal(list(read_video(path, sampling)), expected)


def test_a_key_frame_that_is_none_costs_nothing_but_time(folder):
    """Where an index marks what cannot be decoded alone, everything is decoded."""
    path = moving_video(folder / "marked.mp4", "libx264", {"g": "1000"}, range(40))
    index = video_file.read_index(path)
    stamps = index.stamps
    lying = dataclasses.replace(index, keys=[(stamp, n) for n, stamp in enumerate(stamps[:-1])])
    wanted = _choose(stamps, index.time_base, index.rate, FrameSampling(count=4))
    assert not list(video_file._decode_parts(path, lying, wanted))
    np.testing.assert_array_equal(
        list(video_file.decode(path, lying, wanted)), list(video_file._decode_through(path, wanted))
    )
