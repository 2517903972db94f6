"""Every odd or broken video has an answer, or one sentence that names it; none of them hangs."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import llava_mini_jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.session import Session
from tests import tiny, tiny_model
from tests.data import clips

fast_compilation = tiny.fast_compilation

QUESTION = "how many 7s are there?"
LONGEST = 60  # seconds: a hang would last for ever
MOVING = ("libx264", {"g": "12", "bf": "2"}, range(60))


def cut(path: Path) -> Path:
    content = clips.make_video(path, range(40)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def text(path: Path) -> Path:
    path.write_text("<html>not found</html>")
    return path


def spoilt_pictures(path: Path) -> Path:
    path.mkdir()
    for number in range(12):
        tiny_model.write_picture(path / f"{number}.png", number)
    (path / "9.png").write_bytes(b"")
    return path


# The file, how it is made, and the frames that are seen, or a part of the sentence.
CASES: dict[str, tuple[str, Callable[[Path], Path], int | str]] = {
    "truncated": ("cut.mp4", cut, "Cannot read the video"),
    "zero frames": (
        "none.mkv",
        lambda path: clips.make_video(path, [], sound=True),
        "has 0 frames",
    ),
    "audio only": ("song.mp4", clips.sound_alone, "no video in it"),
    "one frame": ("one.mp4", lambda path: clips.make_video(path, range(1)), 1),
    "shorter than a second": ("short.mp4", lambda path: clips.make_video(path, range(5)), 1),
    "variable rate": ("var.mkv", lambda path: clips.make_video(path, [*range(10), 95]), 9),
    "rotated": (
        "turned.mp4",
        lambda path: clips.turned(clips.make_video(path, range(30)), path, (0, 1, -1, 0)),
        3,
    ),
    "huge dimensions": ("huge.gif", clips.huge_gif, "Cannot read the video"),
    "not a video": ("page.mp4", text, "Cannot read the video"),
    "not there": ("nothing.mp4", lambda path: path, "there is no such file"),
    "noise in the middle": (
        "noise.mkv",
        lambda path: clips.damaged(clips.moving_video(path, *MOVING), "noise"),
        6,
    ),
    "zeros in the middle": (
        "zeros.mp4",
        lambda path: clips.damaged(clips.moving_video(path, *MOVING), "zeros"),
        "Cannot read the video",
    ),
    "a part is missing": (
        "gone.ts",
        lambda path: clips.damaged(clips.moving_video(path, *MOVING), "gone"),
        "is damaged or ends early",
    ),
    "an image of a folder": ("frames", spoilt_pictures, "9.png"),
}


@pytest.fixture(scope="module")
def model():
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.mark.parametrize("name", CASES)
def test_an_answer_or_one_sentence(name, model, tmp_path):
    file, make, expected = CASES[name]
    path = make(tmp_path / file)
    found: list = []

    def watch() -> None:
        session = Session(model, Settings(max_new_tokens=3), chunk=4)
        try:
            session.show_video(path)
            found.append(session.answer_alone(QUESTION))
            found.append(session.frames)
        except InputError as error:
            found.append(str(error))
            with pytest.raises(InputError):  # asked again, it says so again
                if not session.frames:
                    session.show_video(path)
                session.answer_alone(QUESTION)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    thread.join(LONGEST)
    assert not thread.is_alive(), "hangs"
    if isinstance(expected, int):
        answer, frames = found
        assert answer.tokens == 3 and frames == expected
    else:
        (sentence,) = found
        assert expected in sentence and str(path) in sentence and "\n" not in sentence
