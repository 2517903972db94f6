"""Other methods' folders at the command line: answers, and a sentence for what they are not for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_mini_jax import cli
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.run import evaluate, options
from tests import tiny, tiny_model
from tests.weights import test_llama_vid_folders as llama_vid
from tests.weights import test_methods_folders as made

fast_compilation = tiny.fast_compilation

# (its folder as published, --compressor)
METHODS: dict[str, tuple[Callable[..., Path], str | None]] = {
    "mqt": (made.mqt, "mqt,heads=4,count=3"),
    "token_packer": (made.token_packer, "token_packer,heads=2"),
    "m3": (lambda place: made.llava(place, matryoshka_vis_token_scale=[1, 4]), None),
    "voco": (made.voco, None),
    "prumerge": (made.llava, "prumerge,neighbours=5,ratio=1/4"),
    "prumerge_plus": (made.llava, "prumerge_plus,neighbours=5"),
    "visionzip": (made.llava, "visionzip,dominant=9,contextual=4"),
    "fastv": (made.llava, "fastv,layer=1,keep=8"),
}


def ask(capsys: pytest.CaptureFixture, folder: Path, asked: str | None, *more: str):
    """(exit status, what was said, what was complained about)."""
    capsys.readouterr()  # of libraries, while the folder was made
    options = [] if asked is None else ["--compressor", asked]
    status = cli.main(["ask", str(folder), *options, *more, "--max-new-tokens", "2"])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("kind", METHODS)
def test_a_video_for_a_method_of_pictures(kind: str, tmp_path: Path, capsys) -> None:
    make, asked = METHODS[kind]
    film = tiny_model.write_video(tmp_path / "a.mp4", 1)
    status, _, told = ask(capsys, make(tmp_path), asked, "--video", str(film), "what is it?")
    assert status == 2 and told.count("\n") == 1
    assert f'compressor "{kind}" is defined on images, and a video is given' in told


@pytest.mark.parametrize("kind", ["mqt", pytest.param("visionzip", marks=pytest.mark.slow)])
def test_published_folders_are_asked_as_they_are(kind: str, tmp_path: Path, capsys) -> None:
    make, asked = METHODS[kind]
    page = tiny_model.write_picture(tmp_path / "a.png", 1)
    status, said, told = ask(capsys, make(tmp_path), asked, "--image", str(page), "what is it?")
    assert (status, told) == (0, "") and said.strip()


@pytest.mark.slow  # compiles a Q-Former twice
def test_llama_vid_sees_pictures_and_films_for_a_question(tmp_path: Path, capsys) -> None:
    folder = llama_vid.llama_vid(tmp_path, None)
    page = tiny_model.write_picture(tmp_path / "a.png", 1)
    film = tiny_model.write_video(tmp_path / "a.mp4", 2)
    for shown in (["--image", str(page)], ["--video", str(film)]):
        status, said, told = ask(capsys, folder, llama_vid.HEADS, *shown, "what is it?")
        assert (status, told) == (0, "") and said.strip()
    status, _, told = ask(capsys, folder, llama_vid.HEADS, "--image", str(page), "  ")
    assert status == 2 and "turn 1 has no text: add a question" in told
    assert told.count("\n") == 1


def test_options_are_told_before_anything_is_read(tmp_path: Path, capsys) -> None:
    none = str(tmp_path / "none")
    assert cli.main(["convert", none, str(tmp_path / "b"), "--compressor", "fastv,k=2"]) == 2
    assert "does not exist" in capsys.readouterr().err
    folder = made.llava(tmp_path)
    assert cli.main(["convert", str(folder), str(tmp_path / "b"), "--compressor", "fastv,k=2"]) == 2
    told = capsys.readouterr().err
    assert "'k=2' is not a valid option; give FIELD=VALUE once for each of layer, keep" in told
    assert not (tmp_path / "b").exists()
    parts = ["--vision", str(folder), "--llm", str(folder), "--compressor", "fastv"]
    assert cli.main(["convert", *parts, str(tmp_path / "b")]) == 2
    assert "--compressor changes nothing with --vision and --llm" in capsys.readouterr().err


@pytest.mark.slow  # compiles a model of its own
def test_eval_asks_with_a_method_and_keeps_its_answers_apart(tmp_path: Path, capsys) -> None:
    words = ["--model", str(made.llava(tmp_path)), "--benchmarks", "digits", "--limit", "2"]
    words += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    evaluate.evaluate(options.parse([*words, "--compressor", METHODS["visionzip"][1]], None))
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["model"]["model"]["compressor"]["kind"] == "visionzip"
    with pytest.raises(InputError, match="answers that were made with other settings"):
        evaluate.evaluate(options.parse([*words, "--compressor", METHODS["fastv"][1]], None))
