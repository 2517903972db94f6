"""settings.json: answers to other prompts, of other settings, and files that say nothing."""

import dataclasses
import json

import pytest

import eval as eval_program
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Question
from llava_mini_jax.evaluation.run import settings_file
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

ASKED = [
    Question(key=str(n), question_id=n, text=f"Which {n}?\nShort.", prompt=f"Which {n}?")
    for n in range(4)
]


def test_prompts_are_what_the_model_reads_in_any_order():
    digest = settings_file.digest(ASKED)
    assert settings_file.digest(ASKED[::-1]) == digest
    assert settings_file.digest(ASKED[1:]) != digest
    for change, same in (({"text": "Which?"}, False), ({"key": "9"}, False), ({"gold": 1}, True)):
        changed = [dataclasses.replace(ASKED[0], **change), *ASKED[1:]]
        assert (settings_file.digest(changed) == digest) is same, change


def test_answers_of_other_settings_are_refused(tmp_path):
    folder = tmp_path / "model" / "pope"
    path = folder / "settings.json"
    settings_file.check_same(folder, {"prompts": "a", "frames": (1, 2)})
    settings_file.check_same(folder, {"prompts": "b", "frames": (1, 2)})  # nothing was asked yet
    assert json.loads(path.read_text()) == {"prompts": "b", "frames": [1, 2]}
    (folder / "answers-1-of-2.jsonl").touch()
    before = path.stat()
    settings_file.check_same(folder, {"frames": (1, 2), "prompts": "b"})
    assert path.stat().st_ino == before.st_ino  # not written again: others may be reading it
    for other, changed in (
        ({"prompts": "b"}, "frames"),
        ({"prompts": "b", "frames": (1, 2), "more": 3}, "more"),
        ({"prompts": "c", "frames": (1, 3)}, "frames, prompts"),
    ):
        with pytest.raises(InputError, match=rf"model/pope .*other settings \({changed}\): give"):
            settings_file.check_same(folder, other)
    assert json.loads(path.read_text())["prompts"] == "b"


@pytest.mark.parametrize("text", ["", '{"prompts": "a"', "[]", "null"])
def test_settings_that_cannot_be_read_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    (tmp_path / "answers.jsonl").touch()
    for read in (settings_file.read, lambda folder: settings_file.check_same(folder, {})):
        with pytest.raises(InputError, match=r"settings.json .*remove it and its answers"):
            read(tmp_path)


# ------------------------------------------------------------------------------------ by eval.py


@pytest.fixture
def msvd(tmp_path):
    """MSVD-QA's folder with three questions about two videos, which are folders of images."""
    folder = tmp_path / "data" / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA"
    asked, golds = [], []
    for number, text in enumerate(("largest?", "which row?", "read the page.")):
        video = folder / "videos" / f"v{number % 2}"
        video.mkdir(parents=True, exist_ok=True)
        tiny_model.write_picture(video / f"{number}.png", number)
        asked.append({"video_name": video.name, "question": text, "question_id": number})
        golds.append({"answer": "7", "question_id": number})
    (folder / "test_q.json").write_text(json.dumps(asked))
    (folder / "test_a.json").write_text(json.dumps(golds))
    return folder


def run(tmp_path, *more):
    argv = ["--benchmarks", "msvd_qa", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    return eval_program.main([str(word) for word in (*argv, *more)])


def asked_with(tmp_path):
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())
    return found["rules"]["official"]["details"]["asked with"]


def test_answers_to_other_prompts_are_not_kept(tmp_path, msvd, capsys):
    model = ["--model", tiny_model.folder("paper")]
    short = ["--max-new-tokens", "2"]
    assert run(tmp_path, *model, *short, "--limit", "1") == 0
    assert run(tmp_path, *model, *short, "--offset", "1", "--shard", "1/2") == 0  # the same whole
    assert run(tmp_path, *model, *short) == 0
    assert asked_with(tmp_path) == "bare question"
    (answers,) = (tmp_path / "out").glob("*/msvd_qa/answers.jsonl")
    before = answers.read_bytes()
    assert len(before.splitlines()) == 3

    (msvd / "instruction.txt").write_text("Say it in a sentence.\n\n")
    for more in (short, [*short, "--limit", "1"], ["--score-only"]):
        assert run(tmp_path, *model, *more) == 2
        assert "made with other settings (prompts): give another --out" in capsys.readouterr().err
    assert answers.read_bytes() == before

    # A file from elsewhere is scored as what its lines say that it is.
    assert run(tmp_path, "--answers", answers) == 0
    assert asked_with(tmp_path) == "bare question"
    rows = [json.loads(line) for line in before.splitlines()]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(json.dumps({"id": 0, "question": rows[0]["prompt"], "pred": "7"}) + "\n")
    assert run(tmp_path, "--answers", theirs) == 0
    assert asked_with(tmp_path) == "not recorded"
