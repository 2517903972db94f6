"""`llava-mini ask`: urls, standard input, several samples, and JSON for programs."""

import base64
import contextlib
import dataclasses
import http.server
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava_mini_jax
from llava_mini_jax import Model, Settings, cli
from llava_mini_jax.cli import ask, ask_answers
from llava_mini_jax.serving import fetch
from tests import tiny_model

QUESTION = "which digit is in row 1 column 2?"
SHORT = ["--max-new-tokens", "12"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_model.folder("paper")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return llava_mini_jax.load(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_picture(tmp_path_factory.mktemp("pictures") / "a.png", 0)


def document(text: str) -> dict:
    """One JSON document, of what the standard has (Python would read NaN too)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


def data_url(path: Path) -> str:
    return f"data:x/y;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- samples, JSON --------------------------------------------------------------------------------


def test_samples_are_those_of_a_list_of_the_prompt(
    run: Run, folder: Path, model: Model, picture: Path
) -> None:
    sampling = ("--temperature", 1.5, "--seed", 3)
    command = ("ask", folder, "--image", picture, QUESTION, *SHORT, *sampling)
    settings = Settings(max_new_tokens=12, temperature=1.5, seed=3)
    answers = model.answers([QUESTION] * 3, [[picture]] * 3, None, settings)
    expected = [answer.text for answer in answers]
    assert len(set(expected)) == 3
    lines = "".join(f"{number}: {text}\n" for number, text in enumerate(expected, 1))
    assert run(*command, "-n", 3) == (0, lines, "")
    status, out, err = run(*command, "-n", 3, "--json")
    found = document(out)
    assert (status, err) == (0, "")
    seeds = settings.seeds(3)
    assert seeds[0] == 3 and len(set(seeds)) == 3
    assert found["answers"] == [
        dataclasses.asdict(answer) | {"seed": seed}
        for answer, seed in zip(answers, seeds, strict=True)
    ]
    assert run(*command)[1] == f"{expected[0]}\n", "the first one is the one alone"


def test_a_document_counts_tokens_and_says_why_an_answer_ends(
    run: Run, folder: Path, model: Model, picture: Path
) -> None:
    command = ("ask", folder, "--image", picture, QUESTION, "--max-new-tokens", 5, "--json")
    status, out, err = run(*command)
    ids = model.request(QUESTION, model.read_pictures(picture, None)).ids
    text = model.generate(QUESTION, picture, max_new_tokens=5)
    assert (status, err) == (0, "")
    assert document(out) == {
        "model": str(folder),
        "question": QUESTION,
        "frames": 1,
        "prompt_tokens": len(ids),  # whose mark stands for the image's one token
        "image_tokens": 1,
        "answers": [
            {"text": text, "tokens": 5, "finish": "length", "ended_by": None, "seed": None}
        ],
    }


def test_a_plan_for_programs(run: Run, folder: Path, picture: Path) -> None:
    command = ("ask", folder, "--image", picture, "--dry-run", QUESTION)
    found = document(run(*command, "--json")[1])
    shown = run(*command)[1]
    assert f"{found['positions']['needed']:,} = 1 of 1 frames" in shown
    assert f"{found['kv_cache']['slots']:,} slots" in shown
    assert found["positions"]["fit"] and found["device"]["bytes"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("-n 4", "-n is 4 at --temperature 0, where all answers are the same; give --temp"),
        ("-n 0", "-n is 0; give 1 or more answers"),
        ("-n 2 -i --temperature 1", "-n is 2 with -i, which continues from one answer"),
        ("--json -i", "--json is one document about one question; leave out -i"),
        ("--image - -i", "--image - and -i both read standard input; give the image's path"),
        ("--image - --image -", "--image - is given 2 times; it holds one image"),
        ("--video -", "--video - is standard input, which holds an image (--image -) alone"),
    ],
)
def test_what_means_nothing_is_refused(run: Run, options: str, said: str) -> None:
    status, out, err = run("ask", "MODEL", QUESTION, *options.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"llava-mini: {said}")


# --- standard input and urls ----------------------------------------------------------------------


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_picture_on_standard_input(
    run: Run, folder: Path, model: Model, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(QUESTION, picture, max_new_tokens=12)
    piped(monkeypatch, picture.read_bytes())
    assert run("ask", folder, "--image", "-", QUESTION, *SHORT) == (0, f"{expected}\n", "")
    for content, said in ((b"", "it is empty (0 bytes)"), (b"words", "not an image in one of")):
        piped(monkeypatch, content)
        status, out, err = run("ask", folder, "--image", "-", QUESTION)
        assert (status, out) == (2, "") and said in err
        assert err.startswith("llava-mini: standard input (--image -): ")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "which is a terminal" in run("ask", folder, "--image", "-", QUESTION)[2]


class Files(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        moved = self.path.startswith("/moved")
        self.send_response(302 if moved else 200)
        self.send_header("Location", "/a.png")
        self.end_headers()
        if not moved:
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(picture: Path) -> Iterator[str]:
    """Of a server on this machine whose every file is the image."""
    Files.content = picture.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_have_the_rules_of_the_server(
    run: Run,
    folder: Path,
    model: Model,
    picture: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(url: str) -> tuple[int, str, str]:
        return run("ask", folder, "--image", url, QUESTION, *SHORT)

    expected = (0, f"{model.generate(QUESTION, picture, max_new_tokens=12)}\n", "")
    assert asked(data_url(picture)) == expected
    status, out, err = asked(f"{address}/a.png")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"the image '{address}/a.png' could not be fetched from its url (public addr" in err
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    assert asked(f"{address}/a.png") == expected
    assert "could not be fetched" in asked(f"{address}/moved")[2], "redirects are not followed"
    monkeypatch.setattr(fetch, "_get", lambda *_: None)  # longer than it may be
    assert "has more than 33,554,432 bytes; make it smaller" in asked(f"{address}/a.png")[2]
    assert "is malformed (public addresses" in asked("http://user@host/a.png")[2]
    assert "is not valid base64" in asked("data:image/png;base64,%%%")[2]
    said = asked("data:image/png;base64," + base64.b64encode(b"words " * 999).decode())[2]
    assert "not an image in one of the formats" in said and len(said) < 300


def test_a_film_from_a_url(run: Run, folder: Path, model: Model, tmp_path: Path) -> None:
    clip = tiny_model.write_video(tmp_path / "clip.mp4", seconds=3)
    expected = model.generate(QUESTION, videos=clip, max_new_tokens=12)
    command = ("ask", folder, QUESTION, *SHORT, "--video")
    assert run(*command, data_url(clip)) == (0, f"{expected}\n", "")
    frames = data_url(clip).replace("x/y", "video/jpeg")
    assert "--video is a data: url of single frames" in run(*command, frames)[2]


def test_people_at_a_terminal_see_how_far_a_film_is(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, list[tuple[int, int]]] = {"loading": [], "frames": [], "compiling": []}

    @contextlib.contextmanager
    def watching(what: str, **_: object) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: heard[what].append((done, total))

    monkeypatch.setattr(ask, "loading", lambda _: watching("loading"))
    monkeypatch.setattr(ask, "watching", watching)
    monkeypatch.setattr(ask_answers, "watching", watching)
    clip = tiny_model.write_video(tmp_path / "clip.mp4", seconds=12)
    assert run("ask", folder, "--video", clip, QUESTION, *SHORT)[0] == 0
    size = (folder / "model.safetensors").stat().st_size
    for what in ("loading", "frames"):
        done, totals = zip(*heard[what], strict=True)
        assert list(done) == sorted(done) and {done[-1]} == set(totals), what
    assert 0.9 * size < heard["loading"][-1][1] < size, "bytes of the file, but for its header"
    assert (8, 12) in heard["frames"], "chunk by chunk"
