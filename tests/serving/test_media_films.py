"""Films of requests: which frames, what is wrong with them, and the process that decodes them."""

import base64
import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.inference import request
from llava_mini_jax.inference.ticket import Medium
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.serving import film, media, sources
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.media import MediaReader
from llava_mini_jax.serving.parts import VideoOptions, VideoPart
from tests import tiny, tiny_model
from tests.data.clips import _add_silence, make_video
from tests.serving.test_media import BUNDLE, MACHINE, data, picture, reader, saved, shown

MOST = 3 * 255 // 4  # frames that the tiny model's context holds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_video(folder / "short.mp4", range(50))  # five seconds
    make_video(folder / "sound.mp4", range(20), sound=True)
    make_video(folder / "long.mkv", range(0, 4000, 10))  # 400 s, 400 frames
    make_video(folder / "one.mp4", [0])
    return folder


def url(path: Path, kind: str = "video/mp4") -> str:
    return data(path.read_bytes(), kind)


def read(given: str | None, *, to: MediaReader | None = None, tenant: str = "", uuid: Any = None,
         **options: Any) -> Medium:  # fmt: skip
    video = VideoOptions(**options)
    (medium,) = (to or reader()).read([VideoPart(given, uuid)], video, tenant)
    return medium


def refused(given: str | None, **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        medium = read(given, **options)
        list(medium.read())
    assert not MACHINE.search(caught.value.message), caught.value.message
    return caught.value


def frames(medium: Medium) -> np.ndarray:
    found = np.stack(list(medium.read()))
    assert found.dtype == np.uint8 and len(found) == medium.frames
    return found


def expected(path: Path, **sampling: Any) -> np.ndarray:
    return request.read_pictures(None, path, BUNDLE, FrameSampling(**sampling)).pixels


# --- Which frames ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {"fps": 1.0}),
        ({"num_frames": 7}, {"count": 7}),
        ({"num_frames": 10**30}, {"count": 50}),
        ({"num_frames": -1}, {"count": 50}),
        ({"fps": 2}, {"fps": 2.0}),
        ({"fps": -1}, {"count": 50}),
        ({"fps": 1e9}, {"count": 50}),
        ({"fps": 1e308}, {"count": 50}),
        ({"fps": 5e-324}, {"count": 1}),
        ({"fps": 2.0, "num_frames": 3}, {"count": 3}),
        ({"fps": 0.5, "num_frames": 30}, {"fps": 0.5}),
        ({"fps": 2.0, "num_frames": -1}, {"fps": 2.0}),
        ({"fps": -1, "num_frames": 4}, {"count": 4}),
    ],
)
def test_frames_are_those_that_were_asked_for(place, options, sampling):
    found = frames(read(url(place / "short.mp4"), **options))
    np.testing.assert_array_equal(found, expected(place / "short.mp4", **sampling))


@pytest.mark.parametrize("options", [{}, {"num_frames": -1}, {"num_frames": 10**9}, {"fps": 1e9}])
def test_frames_are_at_most_what_the_context_holds(place, options):
    assert read(url(place / "long.mkv"), **options).frames == MOST
    assert read(url(place / "long.mkv"), to=reader(frames=9), **options).frames == 9


@pytest.mark.parametrize("name", ["num_frames", "fps"])
@pytest.mark.parametrize("value", [0, -2, -0.5, float("nan"), float("inf"), float("-inf"), True])
def test_wrong_options_are_400(place, name, value):
    error = refused(url(place / "short.mp4"), **{name: value})
    assert error.status == 400 and error.param == f"media_io_kwargs.video.{name}"


def test_frames_of_the_release_are_chosen_as_it_does(place):
    bundle = tiny_model.bundle("release")
    found = frames(read(url(place / "short.mp4"), to=reader(bundle), num_frames=3))
    sampling = FrameSampling(count=3, rule="release")
    pixels = request.read_pictures(None, place / "short.mp4", bundle, sampling).pixels
    np.testing.assert_array_equal(found, pixels)


def test_the_declared_type_is_not_believed(place):
    sent = {read(url(place / "short.mp4", kind)).key for kind in ("video/mp4", "image/png", "")}
    assert len(sent) == 1
    assert read(url(place / "short.mp4"), num_frames=2).key not in sent


def test_a_film_of_one_frame_is_read_at_once(place):
    medium = read(url(place / "one.mp4"))
    assert medium.frames == 1
    np.testing.assert_array_equal(frames(medium), frames(medium))


# --- Frames that the client has taken -------------------------------------------------------------


def sent(*contents: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(c).decode() for c in contents)


def test_frames_of_the_client():
    images = [picture(seed) for seed in range(5)]
    given = sent(*map(saved, images))
    np.testing.assert_array_equal(frames(read(given)), np.stack([shown(i) for i in images]))
    assert read(given, fps=0.1).frames == 5
    np.testing.assert_array_equal(
        frames(read(given, num_frames=2)), np.stack([shown(images[1]), shown(images[3])])
    )
    assert read(given).key != read(sent(*map(saved, images[::-1]))).key
    two = saved(images[0])
    assert read(sent(two, two)).key != read(sent(two + two)).key


def test_ten_thousand_frames_are_refused_before_one_is_decoded(monkeypatch):
    monkeypatch.setattr(media, "load_image", None)
    monkeypatch.setattr(sources, "_decoded", None)
    error = refused("data:video/jpeg;base64," + "," * 9_999)
    assert error.status == 400 and f"10,000 frames, the limit is {MOST}" in error.message


@pytest.mark.parametrize(
    "given", [sent(), sent(saved(picture()), b""), sent(b"no image"), "data:video/jpeg;base64,,,",
              "data:video/jpeg;base64,AA==A", "data:video/jpeg," + sent(saved(picture()))[23:]]
)  # fmt: skip
def test_wrong_frames_of_the_client(given):
    assert refused(given).status == 400


def test_frames_of_the_client_are_decoded_as_they_are_taken():
    medium = read(sent(saved(picture()), b"no image", saved(picture())))
    found = medium.read()
    np.testing.assert_array_equal(next(found), shown(picture()))
    with pytest.raises(ApiError, match="frame 2 of video 1") as caught:
        next(found)
    assert caught.value.status == 400


# --- What is no film ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(place: Path) -> dict[str, bytes]:
    with av.open(str(place / "silence.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=8000)
        _add_silence(container, audio)
    whole = (place / "short.mp4").read_bytes()
    return {
        "sound alone": (place / "silence.mp4").read_bytes(),
        "no frames": whole[: whole.index(b"mdat") + 4],
        "cut": whole[: len(whole) // 2],
        "text": b"#EXTM3U\nfile:///etc/passwd\n",
        "a playlist": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "an image": saved(picture()),
        "nothing much": b"\0",
        "zeros": bytes(100_000),
    }


BROKEN = ("sound alone", "no frames", "cut", "text", "a playlist", "an image", "nothing much",
          "zeros")  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_film_is_400(broken, name):
    error = refused(data(broken[name], "video/mp4"))
    assert error.status == 400 and error.param == "video_url"
    assert "not a complete video" in error.message


def test_pixels_of_a_frame_are_limited(place):
    assert (
        "frames have more than 3,000 pixels"
        in refused(url(place / "short.mp4"), to=reader(image_pixels=3000)).message
    )
    assert read(url(place / "short.mp4"), to=reader(image_pixels=64 * 48)).frames == 5


# --- The process ----------------------------------------------------------------------------------


def children() -> list[str]:
    """Processes of ours that decode films, but for those that have ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and b"film_child" in (place / "cmdline").read_bytes():
                found.append(place.name)
    return found


def running(monkeypatch, tmp_path: Path, body: str) -> None:
    """Another program in the place of the one that decodes."""
    script = tmp_path / "film_child.py"
    script.write_text(body)
    monkeypatch.setattr(film, "_CHILD", script)


LIMITED = """
from llava_mini_jax.serving import film_child

def hostile(*_, **__):
    {body}

film_child.read_video = hostile
film_child.main()
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: pass", "more than 1 s"),
        ("keep = []\n    while True: keep.append(bytearray(10**7))", "more than 200 MB"),
        ("import os; os.kill(os.getpid(), 11)", "not a complete video"),
        ("import os; os.abort()", "not a complete video"),
        ("import os; os._exit(0)", "not a complete video"),
        ("raise RuntimeError('at 0x7f0012345678 in /tmp/x')", "not a complete video"),
        ("raise SystemExit", "not a complete video"),
    ],
)
def test_whatever_happens_there_is_an_error_here(place, monkeypatch, tmp_path, body, reason):
    running(monkeypatch, tmp_path, LIMITED.format(body=body))
    monkeypatch.setattr(film, "_PATIENCE", 50)  # its own limits end it
    limits = {"film_seconds": 1.0, "film_megabytes": 200}
    error = refused(url(place / "short.mp4"), to=reader(**limits))
    assert error.status == 400 and reason in error.message
    assert not children()
    monkeypatch.undo()
    assert read(url(place / "short.mp4")).frames == 5  # others go on


def test_a_process_that_sleeps_is_ended(place, monkeypatch, tmp_path):
    running(monkeypatch, tmp_path, "import time; time.sleep(100)")
    began = time.monotonic()
    error = refused(url(place / "short.mp4"), to=reader(film_seconds=0.2))
    assert "more than 0.2 s" in error.message and time.monotonic() - began < 50


def test_a_film_that_is_dropped_ends_its_process(place):
    found = read(url(place / "long.mkv")).read()
    next(found)
    assert len(children()) == 1
    del found
    gc.collect()
    assert not children()


SLEEPER = """
import sys, time
sys.stdout.buffer.write(b'{"frames": 5}\\n' + b"\\x01" + bytes(16 * 16 * 3))
sys.stdout.buffer.flush()
time.sleep(100)
"""


def test_a_process_that_dies_between_frames(place, monkeypatch, tmp_path):
    # It waits behind its first frame: all frames of a film as small as ours fit into the pipe.
    running(monkeypatch, tmp_path, SLEEPER)
    found = read(url(place / "short.mp4")).read()
    next(found)
    (child,) = children()
    os.kill(int(child), signal.SIGSEGV)
    with pytest.raises(ApiError, match="not a complete video"):
        list(found)
    assert not children()


def test_a_process_that_does_not_notice_is_ended(place, monkeypatch, tmp_path):
    running(monkeypatch, tmp_path, SLEEPER)
    found = read(url(place / "short.mp4")).read()
    next(found)
    assert len(children()) == 1
    found.close()
    assert not children()


def test_no_more_frames_are_decoded_than_are_taken(place, tmp_path, monkeypatch):
    """The process waits for the pipe, whatever the film's length."""
    body = LIMITED.format(body=f"return Told(open({str(tmp_path / 'count')!r}, 'w'))")
    body = body.replace("film_child.read_video", TOLD + "\nfilm_child.read_video")
    running(monkeypatch, tmp_path, body)
    bundle = tiny_model.bundle("paper")
    found = read(url(place / "short.mp4"), to=reader(bundle)).read()
    next(found)
    time.sleep(0.5)
    size = bundle.images.size**2 * 3
    decoded = int((tmp_path / "count").read_text().split()[-1])
    assert 1 <= decoded <= 2**20 // size + 20
    for _ in range(decoded):
        next(found)
    time.sleep(0.2)
    assert int((tmp_path / "count").read_text().split()[-1]) > decoded


TOLD = """
import numpy as np

class Told:
    def __init__(self, file): self.file, self.count = file, 0
    def __len__(self): return 10**6
    def __iter__(self): return self
    def __next__(self):
        self.count += 1
        print(self.count, file=self.file, flush=True)
        return np.zeros((8, 8, 3), np.uint8)
"""

MEMORY = """
import resource, sys
from tests.serving import test_media_films as t
from pathlib import Path
to = t.reader(frames=int(sys.argv[2]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
medium = t.read(t.url(Path(sys.argv[1])), to=to, num_frames=-1)
count = sum(1 for _ in medium.read())
print(count, peak() / 1024)
"""


@pytest.mark.slow  # writes a film of three hours
def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path):
    """Three hours, of which 3,000 frames are read, against five."""
    make_video(tmp_path / "hours.mkv", range(0, 108_000, 30))
    peaks = []
    for most in (5, 3000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "hours.mkv"), str(most)],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        count, peak = done.stdout.split()
        assert int(count) == most
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] < 8


# --- Names and files ------------------------------------------------------------------------------


def test_a_film_that_was_named_need_not_be_sent_again(place, monkeypatch):
    to, given = reader(), url(place / "short.mp4")
    first = read(given, to=to, tenant="a", uuid="film")
    before = frames(first)
    started = []
    monkeypatch.setattr(film.subprocess, "Popen", lambda *a, **k: started.append(a))
    again = read(None, to=to, tenant="a", uuid="film")
    assert again.key == first.key and again.frames == first.frames and not started
    monkeypatch.undo()
    del first
    np.testing.assert_array_equal(frames(again), before)
    assert read(None, to=to, tenant="a", uuid="film", num_frames=2).frames == 2
    for tenant, uuid in (("b", "film"), ("a", "other")):
        assert refused(None, to=to, tenant=tenant, uuid=uuid).status == 404


def test_frames_that_were_named_need_not_be_sent_again():
    to = reader()
    first = read(sent(*(saved(picture(i)) for i in range(4))), to=to, uuid="film")
    again = read(None, to=to, uuid="film")
    assert again.key == first.key
    np.testing.assert_array_equal(frames(again), frames(first))


def test_nothing_of_a_film_stays_behind(place, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    medium = read(url(place / "short.mp4"))
    assert len(list(tmp_path.iterdir())) == 1
    found = medium.read()
    next(found)
    del medium
    gc.collect()
    assert len(list(found)) == 4  # who reads it keeps it
    del found
    gc.collect()
    assert not list(tmp_path.iterdir()) and not children()


def test_films_below_the_folder(place):
    to = reader(folder=place)
    medium = read(f"file://{place}/short.mp4", to=to)
    np.testing.assert_array_equal(frames(medium), expected(place / "short.mp4", fps=1.0))
    assert medium.key == read(url(place / "short.mp4")).key
    for path in (place, place / "none.mp4", "/dev/zero", "/etc/passwd"):
        assert refused(f"file://{path}", to=to).status == 400
    assert refused(f"file://{place}/short.mp4").status == 400


def test_a_changed_film_has_another_key(place, tmp_path):
    to = reader(folder=tmp_path)
    keys = set()
    for name in ("short.mp4", "sound.mp4"):
        (tmp_path / "a.mp4").write_bytes((place / name).read_bytes())
        keys.add(read(f"file://{tmp_path}/a.mp4", to=to).key)
    assert len(keys) == 2


def test_pixels_are_those_of_the_picture_path(place):
    """What the process hands over is what this one would have made."""
    how = film.How(BUNDLE.images, FrameSampling(count=3), "bicubic", reader()._limits)
    found = list(film.read_frames(place / "short.mp4", how, "video 1"))
    first = Image.fromarray(next(iter(request.read_video(place / "short.mp4", how.sampling))))
    np.testing.assert_array_equal(found[0], preprocess(first, BUNDLE.images))


def test_a_method_of_pictures_takes_no_film(place: Path) -> None:
    old = BUNDLE.model
    own = VisionZipConfig(layer=0, dominant=4, contextual=3)
    cfg = tiny.model("paper", old.llm, old.vision, compressor=own, prefusion_layers=0)
    to = reader(dataclasses.replace(BUNDLE, model=cfg))
    with pytest.raises(ApiError, match='"visionzip" is defined on images, and a video is ') as e:
        read(url(place / "short.mp4"), to=to)
    assert e.value.status == 400 and e.value.param == "video_url"
