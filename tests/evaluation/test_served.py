"""Questions asked through HTTP: the answers file is the local run's, byte for byte."""

import base64
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eval as eval_program
import llava_mini_jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run import runner, served
from llava_mini_jax.evaluation.run.sheet import Shard
from llava_mini_jax.inference.request import sampling_for
from tests import tiny, tiny_model
from tests.evaluation.judge_server import completion
from tests.serving.process import serving

fast_compilation = tiny.fast_compilation

TOKENS = 5
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
    max_frames=4,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Question]:
    """Images of several kinds, films of every sort, and text."""
    home = tmp_path_factory.mktemp("world")
    (home / "c").mkdir()
    for number in range(6):
        tiny_model.write_picture(home / "c" / f"{number}.png", 20 + number)
    clip = tiny_model.write_video(home / "a.mp4", 9)
    array = np.stack([tiny_model.picture(40 + number) for number in range(3)])
    page = tiny_model.write_picture(home / "page.png", 9)
    lying = home / "lying.jpg"  # a photograph whose orientation is said apart
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(tiny_model.picture(5)).save(lying, exif=exif)
    clear = home / "clear.png"
    Image.fromarray(np.dstack([tiny_model.picture(6), np.zeros((30, 40), np.uint8)])).save(clear)
    shown: list[tuple[str, dict[str, Any]]] = [
        ("which digit?", {"video": clip}),
        ("row?", {"image": page}),
        ("how many 7s?", {}),
        ("largest?", {"video": clip}),
        ("column?", {"image": lying}),
        (" which digit is in row 1?", {"image": clear}),
        ("read the page.", {"image": page.read_bytes()}),
        ("which digit?", {"video": array}),
        ("which digit?", {"video": home / "c"}),
        ("row?", {"video": home / "c"}),
        ("both?", {"image": page, "video": array}),
    ]
    return [
        Question(key=f"q{number}", question_id=number, text=text, prompt=text, **given)
        for number, (text, given) in enumerate(shown)
    ]


class Answering:
    """A server in front of a model, for judge_server; `bodies` are what it was asked."""

    def __init__(self, model: Any, home: Path):
        self.model, self.home = model, home
        self.bodies: list[dict[str, Any]] = []
        self.known: dict[str, str] = {}
        self.lock = threading.Lock()

    def __call__(self, handler: Any, body: dict[str, Any], nth: int) -> None:
        with self.lock:
            self.bodies.append(body)
            answer = self.answer(body)
        if answer is None:
            error = {"message": "the uuid is not known", "param": "uuid", "code": 404}
            return handler.give(404, {"error": error})
        message = {"role": "assistant", "content": answer.text}
        finish = "stop" if answer.finish == "stop" else "length"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        handler.give(200, {"choices": [choice], "usage": {"completion_tokens": answer.tokens}})

    def answer(self, body: dict[str, Any]) -> Any:
        (message,) = body["messages"]
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, images, videos = "", [], []
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
                continue
            given = part[part["type"]]
            url = given["url"] if given else self.known.get(part["uuid"])
            if url is None:
                return None
            if "uuid" in part:
                self.known[part["uuid"]] = url
            text += "<image>"
            head, letters = url.split(",", 1)
            files = [base64.b64decode(one, validate=True) for one in letters.split(",")]
            if part["type"] == "image_url":
                assert head == "data:image/png;base64"
                images += files
            elif head == "data:video/jpeg;base64":
                frames = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
                videos.append(np.stack(frames))
            else:
                path = self.home / f"{len(self.bodies)}.mp4"
                path.write_bytes(files[0])
                videos.append(path)
        # Behind an image a line of its own, where the client brings no white space.
        text = text.replace("<image><image>", "<image>\n<image>")
        if parts[-1]["type"] == "text" and len(parts) > 1 and not parts[-1]["text"][0].isspace():
            text = text[: -len(parts[-1]["text"])] + "\n" + parts[-1]["text"]
        most = body.get("media_io_kwargs", {}).get("video", {}).get("num_frames")
        (answer,) = self.model.answers(
            [text],
            [images],
            [videos],
            llava_mini_jax.Settings(max_new_tokens=body.get("max_completion_tokens", 100)),
            sampling=sampling_for(self.model.bundle, max_frames=most),
        )
        return answer


def server_of(started: Any, **given: Any) -> served.Server:
    endpoint = served.endpoint(started.url.removesuffix("/v1"), None, 4, 20.0)
    settings = {"first_wait_s": 0.01, "tries": 3, **given}
    for name, value in settings.items():
        object.__setattr__(endpoint, name, value)
    return served.Server(endpoint)


def ask(server: served.Server, questions: list[Question], folder: Path, **given: Any) -> Any:
    given = {"shard": Shard(), "max_new_tokens": TOKENS} | given
    return served.ask(server, "tiny", "tiny", BENCHMARK, questions, folder, **given)


@pytest.fixture(scope="module")
def local(model, questions, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("local")
    given = {"shard": Shard(), "batch_size": 2, "max_new_tokens": TOKENS}
    run = runner.ask(model, "tiny", BENCHMARK, questions, folder, **given)
    assert run.unreadable == {}
    return (folder / "answers.jsonl").read_bytes()


def test_the_file_is_the_local_runs(model, questions, local, serve, tmp_path):
    answering = Answering(model, tmp_path)
    run = ask(server_of(serve(answering)), questions, tmp_path / "out")
    assert (run.asked, run.unreadable) == (len(questions), {})
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == local
    assert len({json.loads(line)["text"] for line in local.splitlines()}) > 6
    bodies = answering.bodies
    assert all((b["model"], b["temperature"]) == ("tiny", 0) for b in bodies)
    # Films that several questions are about are sent once.
    films = [p for b in bodies for p in b["messages"][0]["content"] if isinstance(p, dict)]
    films = [part for part in films if part["type"] == "video_url"]
    assert sum(part["video_url"] is None for part in films) == 2 and len(films) == 6
    # A line of its own for the text, which the server gives to one that brings no white space.
    texts = [
        b["messages"][0]["content"][-1] for b in bodies if len(b["messages"][0]["content"]) > 1
    ]
    texts = [part["text"] for part in texts if isinstance(part, dict)]
    assert "\n which digit is in row 1?" in texts and "column?" in texts
    # Only where frames of a file are chosen does the server need to be told how.
    assert [b["media_io_kwargs"] for b in bodies if "media_io_kwargs" in b] == [
        {"video": {"fps": 1.0, "num_frames": 4}}
    ] * 2


@pytest.mark.slow
def test_the_file_is_the_local_runs_by_the_server_itself(questions, local, tmp_path):
    with serving(tiny_model.folder("paper"), "--served-model-name", "tiny") as url:
        run = ask(served.Server(served.endpoint(url, None, 4, 60.0)), questions, tmp_path)
    assert (run.asked, run.unreadable) == (len(questions), {})
    assert (tmp_path / "answers.jsonl").read_bytes() == local


def test_what_is_there_is_not_asked_and_shards_are_the_local_ones(
    model, questions, local, serve, tmp_path
):
    started = serve(Answering(model, tmp_path))
    lines = local.splitlines(keepends=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").write_bytes(b"".join(lines[3:]))
    told: list[int] = []
    assert ask(server_of(started), questions, tmp_path / "out", progress=told.append).asked == 3
    assert sum(told) == len(questions)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == local
    for index in range(2):
        ask(server_of(started), questions, tmp_path / "parts", shard=Shard(index, 2))
    parts = [path.read_bytes() for path in (tmp_path / "parts").glob("*.jsonl")]
    assert sorted(b"".join(parts).splitlines()) == sorted(local.splitlines())


def test_a_server_that_is_busy_silent_or_forgetful_is_asked_again(
    model, questions, local, serve, tmp_path
):
    answering = Answering(model, tmp_path)
    seen: list[str] = []

    def treat(handler: Any, body: dict[str, Any], nth: int) -> None:
        seen.append(handler.content)
        if nth == 0 and len(seen) % 3 == 0:
            return handler.give(503, {}, Retry_After="0")
        if nth == 0 and len(seen) % 3 == 1:
            return None  # silence: the connection is closed
        if len(seen) % 7 == 0:
            answering.known.clear()
        return answering(handler, body, nth)

    run = ask(server_of(serve(treat), concurrency=1, tries=4), questions, tmp_path / "out")
    assert run.asked == len(questions) < len(seen)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == local


def test_it_waits_as_long_as_the_server_says(questions, serve, tmp_path):
    def treat(handler: Any, body: dict[str, Any], nth: int) -> None:
        if nth == 0:
            return handler.give(429, {}, Retry_After="0.3")
        return handler.give(200, completion("7"))

    began = time.monotonic()
    ask(server_of(serve(treat)), questions[2:3], tmp_path)
    assert time.monotonic() - began > 0.3


def test_what_is_refused_is_told_and_the_others_go_on(questions, serve, tmp_path):
    def treat(handler: Any, body: dict[str, Any], nth: int) -> None:
        if "how many 7s?" in handler.content:
            return handler.give(400, {"error": {"message": "no", "code": 400}})
        return handler.give(200, completion("7"))

    gone = Question(key="gone", question_id=99, text="?", prompt="?", image=Path("no.png"))
    run = ask(server_of(serve(treat)), [*questions[1:3], gone], tmp_path)
    assert run.asked == 1
    assert run.unreadable["q2"] == "the server refuses it (status 400: 400; no)"
    assert "no.png" in run.unreadable["gone"]


def test_an_answer_may_take_the_room_that_there_is(questions, serve, tmp_path):
    def treat(handler: Any, body: dict[str, Any], nth: int) -> None:
        if "max_completion_tokens" in body:
            error = {"message": "too long", "param": "input_tokens", "code": 400}
            return handler.give(400, {"error": error})
        return handler.give(200, completion("7") | {"usage": {"completion_tokens": 3}})

    assert ask(server_of(serve(treat)), questions[2:3], tmp_path).asked == 1


@pytest.mark.parametrize(
    ("status", "told"), [(401, "status 401"), (404, "gives no chat"), (500, "resumes from here")]
)
def test_a_server_that_cannot_be_asked_ends_the_run_in_a_sentence(
    questions, serve, tmp_path, status, told
):
    started = serve(lambda handler, body, nth: handler.give(status, {}))
    with pytest.raises(InputError, match=told):
        ask(server_of(started), questions[:3], tmp_path)


def test_those_that_wait_when_it_fails_are_not_waited_for(serve, tmp_path):
    """Many more than are in flight; none of them is asked any more."""
    many = [Question(key=f"q{n}", question_id=n, text=f"{n}?", prompt=f"{n}?") for n in range(300)]
    asked: list[int] = []

    def treat(handler: Any, body: dict[str, Any], nth: int) -> None:
        asked.append(nth)
        handler.give(401, {})

    server, told = server_of(serve(treat)), []

    def run() -> None:
        try:
            ask(server, many, tmp_path)
        except InputError as error:
            told.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and "status 401" in told[0]
    assert len(asked) < 100


def test_the_command_needs_no_device_and_no_folder(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llava_mini_jax, "load", lambda *given, **more: pytest.fail("loaded"))
    monkeypatch.setenv("KEY", "sk-of-the-server")
    started = serve(lambda handler, body, nth: handler.give(200, completion("7")))
    words = ["--server", started.url.removesuffix("/v1"), "--server-key-variable", "KEY"]
    words += ["--benchmarks", "digits", "--limit", "4", "--out", str(tmp_path)]
    assert eval_program.main(words) == 0
    assert started.keys == {"Bearer sk-of-the-server"}
    assert "tiny" in capsys.readouterr().out  # the first of the server's models
    lines = (tmp_path / "tiny" / "digits" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["model_id"] for line in lines] == ["tiny"] * 4
    assert eval_program.main([*words, "--model", "other"]) == 0
    assert (tmp_path / "other" / "digits" / "answers.jsonl").exists()
    assert eval_program.main([*words, "--max-new-tokens", "3"]) == 2
    assert "other settings (max_new_tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--server", "u", "--dtype", "int8"], "--dtype changes nothing with --server"),
        (["--server", "u", "--batch-size", "2"], "--batch-size changes nothing with --server"),
        (["--server", "u", "--compilation-cache", "x"], "--compilation-cache changes nothing"),
        (["--model", "m", "--server-timeout", "3"], "--server-timeout changes nothing without"),
        (["--score-only", "--model", "m", "--server", "u"], "--server changes nothing with"),
        (["--server", "localhost"], "the server's base URL is not usable"),
        (["--server", "http://h", "--server-concurrency", "0"], "concurrency is 0"),
        (["--server", "http://h", "--server-key-variable", "NO_KEY"], "NO_KEY is not set"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(words, told, capsys, tmp_path):
    assert eval_program.main([*words, "--benchmarks", "digits", "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
