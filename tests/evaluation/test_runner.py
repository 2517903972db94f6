"""The runner: every answer is Model.generate's, a video is looked at once, whatever interrupts."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.data.media import video as videos
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run import runner
from llava_mini_jax.inference import seeing_programs, session_media
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.request import sampling_for
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

TOKENS = 5
WORDS = ("how many 7s?", "which digit is in row 1 column 2?", "largest?", "read the page.")
SECONDS = {"a.mp4": 11, "b.mp4": 3}  # one frame a second is read
PICTURES = 5  # of the folder "c"
ARRAY = 9  # frames
BENCHMARK = Benchmark(
    name="world",
    title="World",
    folder="world",
    files={},
    metric="accuracy, %",
    paper={},
    max_new_tokens=TOKENS,
    questions=lambda folder: [],
    score=lambda *given: None,
    max_frames=10,
)


@pytest.fixture(scope="module", params=["paper", "release"])
def model(request) -> Model:
    return llava_mini_jax.load(tiny_model.folder(request.param))


@pytest.fixture(scope="module")
def paper() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """Videos of all sorts: files, a folder of images, an array."""
    home = tmp_path_factory.mktemp("world")
    for name, seconds in SECONDS.items():
        tiny_model.write_video(home / name, seconds)
    (home / "c").mkdir()
    for number in range(PICTURES):
        tiny_model.write_picture(home / "c" / f"{number}.png", 20 + number)
    array = np.stack([tiny_model.picture(40 + number) for number in range(ARRAY)])
    return {name: home / name for name in (*SECONDS, "c")} | {"array": array}


def questions_about(shown: dict) -> list[Question]:
    """Every question about every video, the videos taking turns, and others in between."""
    found = [(f"{name}/{n}", text, {"video": video}) for n, text in enumerate(WORDS)
             for name, video in shown.items()]  # fmt: skip
    picture = tiny_model.write_picture(shown["a.mp4"].with_name("page.png"), 9)
    found.insert(3, ("text", "row?", {}))
    found.insert(7, ("picture", "column?", {"image": picture}))
    return [
        Question(key=key, question_id=number, text=text, prompt=text, **given)
        for number, (key, text, given) in enumerate(found)
    ]


def ask(model, questions, folder: Path, **given):
    given = {"shard": runner.Shard(), "batch_size": 2, "max_new_tokens": TOKENS} | given
    return runner.ask(model, "tiny", BENCHMARK, questions, folder, **given)


def answers_in(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "answers.jsonl").read_text().splitlines())
    return {line["metadata"]["key"]: line["text"] for line in lines}


def generated(model: Model, questions) -> dict[str, str]:
    sampling = sampling_for(model.bundle, max_frames=BENCHMARK.max_frames)
    return {
        q.key: model.generate(
            q.text, q.image, q.video, max_new_tokens=TOKENS, sampling=sampling
        )
        for q in questions
    }  # fmt: skip


@pytest.fixture
def looked(monkeypatch) -> list[int]:
    """Frames of each call of the tower, padding included."""
    sizes, encode = [], seeing_programs.encode_vision

    def noted(params, pixels_IJYXC, cfg):
        sizes.append(len(pixels_IJYXC))
        return encode(params, pixels_IJYXC, cfg)

    monkeypatch.setattr(seeing_programs, "encode_vision", noted)
    return sizes


def test_answers_are_those_of_generate_from_one_look(model, shown, tmp_path, looked, monkeypatch):
    questions = questions_about(shown)
    expected = generated(model, questions)
    read = model.read_pictures
    whole = []

    def noted(self, images, shown, *given):
        whole.append(shown)
        return read(images, shown, *given)

    monkeypatch.setattr(Model, "read_pictures", noted)
    opened = Counter()

    def open_video(path, sampling):
        opened[path.name] += 1
        return videos.read_video(path, sampling)

    monkeypatch.setattr(session_media, "read_video", open_video)
    looked.clear()
    run = ask(model, questions, tmp_path)
    assert answers_in(tmp_path) == expected
    assert list(answers_in(tmp_path)) == [question.key for question in questions]
    assert len(set(expected.values())) > 10  # the model tells videos and questions apart
    assert (run.asked, run.unreadable) == (len(questions), {})
    # Nothing of a video is read twice, nor all of it together.
    assert set(opened) == {"a.mp4", "b.mp4", "c"} and whole == [None, None]
    assert set(opened.values()) == {1}
    # The image; 10, 3, 5 and 9 frames in chunks of 8.
    assert sorted(looked) == [1, 1, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("moment", [1, 4, 6, 9, 13])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(paper, shown, tmp_path, moment):
    questions = questions_about(shown)
    ask(paper, questions, tmp_path / "whole")
    done = []

    def stop(count: int) -> None:
        done.extend([0] * count)
        if len(done) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(paper, questions, tmp_path / "parts", progress=stop)
    path = tmp_path / "parts" / "answers.jsonl"
    assert len(path.read_text().splitlines()) == moment
    path.write_text(path.read_text() + '{"question_id": 3, "te')  # as a kill leaves it
    assert ask(paper, questions, tmp_path / "parts").asked == len(questions) - moment
    assert path.read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_shards_take_whole_videos(paper, shown, tmp_path):
    questions = questions_about(shown)
    ask(paper, questions, tmp_path)
    found = {}
    for index in (1, 0):
        ask(paper, questions, tmp_path / "parts", shard=runner.Shard(index, 2))
        path = tmp_path / "parts" / f"answers-{index + 1}-of-2.jsonl"
        lines = map(json.loads, path.read_text().splitlines())
        found[index] = {line["metadata"]["key"]: line["text"] for line in lines}
    assert found[0] | found[1] == answers_in(tmp_path) and not found[0].keys() & found[1].keys()
    shared = {key.split("/")[0] for key in found[0]} & {key.split("/")[0] for key in found[1]}
    assert not shared and all(len(part) > 4 for part in found.values())


def test_what_breaks_in_the_middle_is_told_once_and_asked_again(
    paper, shown, tmp_path, looked
):  # fmt: skip
    folder = tmp_path / "c"
    folder.mkdir()
    for number in range(12):
        tiny_model.write_picture(folder / f"{number}.png", number)
    good = (folder / "9.png").read_bytes()
    (folder / "9.png").write_bytes(good[:40])
    questions = questions_about({"a.mp4": shown["a.mp4"], "c": folder, "gone": tmp_path / "no.mp4"})
    run = ask(paper, questions, tmp_path / "out")
    broken = [q.key for q in questions if q.key.startswith(("c/", "gone/"))]
    assert list(run.unreadable) == sorted(broken) and run.asked == len(questions) - len(broken)
    for key, reason in run.unreadable.items():
        assert ("9.png" if key.startswith("c/") else "there is no such file") in reason, reason
    # The image; ten frames of a.mp4, eight of what then breaks, once.
    assert sorted(looked) == [1, 2, 8, 8]
    (folder / "9.png").write_bytes(good)
    again = ask(paper, questions, tmp_path / "out")
    assert again.asked == 4 and list(again.unreadable) == [f"gone/{n}" for n in range(4)]
    sound = [q for q in questions if not q.key.startswith("gone/")]
    assert answers_in(tmp_path / "out") == generated(paper, sound)


def test_what_is_compiled_is_heard_before_the_first_answer(paper, shown, tmp_path, monkeypatch):
    heard, own = [], runner.WarmUp

    class Counting(own):
        def wait(self, watch):
            watch(3, 12)
            super().wait(watch)

    monkeypatch.setattr(runner, "WarmUp", Counting)
    monkeypatch.setattr(runner, "compiled_programs", lambda: 0)
    one = [question for question in questions_about(shown) if question.video is None][:1]
    ask(
        paper,
        one,
        tmp_path,
        progress=lambda done: heard.append(done),
        compiling=lambda done, total: heard.append((done, total)),
    )
    assert heard[0] == (3, 12) and heard.count(1) == 1


def test_a_question_that_does_not_fit_leaves_the_others(paper, shown, tmp_path):
    questions = questions_about({"a.mp4": shown["a.mp4"]})
    long = dataclasses.replace(questions[0], text="row " * 300)
    many = np.zeros((300, 8, 8, 3), np.uint8)
    huge = Question(key="huge", question_id=99, text="row?", prompt="row?", video=many)
    run = ask(paper, [long, *questions[1:], huge], tmp_path)
    assert run.unreadable.keys() == {long.key, "huge"}
    assert "needs" in run.unreadable[long.key] and "300 images and" in run.unreadable["huge"]
    assert answers_in(tmp_path) == generated(paper, questions[1:])


def test_a_method_of_pictures_is_asked_about_no_video(paper, shown, tmp_path):
    """Before anything is asked, and not once for every question."""
    vision, llm = paper.bundle.model.vision, paper.bundle.model.llm
    own = VisionZipConfig(layer=0, dominant=4, contextual=3)
    cfg = tiny.model("paper", llm, vision, compressor=own, prefusion_layers=0)
    model = dataclasses.replace(paper, bundle=dataclasses.replace(paper.bundle, model=cfg))
    with pytest.raises(InputError, match='"visionzip" is defined on images, and a video is given'):
        ask(model, questions_about(shown), tmp_path)
    assert not list(tmp_path.iterdir())
