"""`llava-mini analyze` through folders and files."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.cli import main
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation


@pytest.fixture
def llava_json(tmp_path):
    """Two images, one of text alone, one whose image is missing."""
    tiny_model.write_picture(tmp_path / "a.png", 0)
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "3 4"}]
    told = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "3"}]
    rows = [
        {"id": "1", "image": "a.png", "conversations": turns},
        {"id": "2", "conversations": told},
        {"id": "3", "image": "gone.png", "conversations": turns},
        {"id": "4", "image": "a.png", "conversations": turns},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("dialect", ["release", "llava-1.5"])
def test_attention(dialect, llava_json, tmp_path, capsys):
    folder, out = str(tiny_model.folder(dialect)), tmp_path / "out"
    words = ["--data", str(llava_json), "--out", str(out), "--batch-size", "2"]
    assert main(["analyze", "attention", folder, *words]) == 0
    shown = capsys.readouterr()
    assert "2 samples are left out" in shown.err and "sample 2 has no image" in shown.err
    assert "from response" in shown.out
    found = json.loads((out / "attention.json").read_text())
    assert found["examples"] == 2
    assert found["tokens"]["vision"] == 2 * (1 if dialect == "release" else 16)
    shares = [found["attention"][f"response to {kind}"][0] for kind in found["tokens"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    for name in ("attention", "entropy", "maps"):
        assert np.asarray(Image.open(out / f"{name}.png")).std() > 5  # not a blank sheet


def test_compression_of_a_picture_and_a_video(tmp_path, capsys):
    picture = tiny_model.write_picture(tmp_path / "a.png", 0)
    video = tiny_model.write_video(tmp_path / "clip.mp4", 3)
    folder, out = str(tiny_model.folder("release")), tmp_path / "out"
    words = ["--image", str(picture), "--video", str(video), "--frames", "2", "--out", str(out)]
    assert main(["analyze", "compression", folder, *words]) == 0
    shown = capsys.readouterr().out
    assert "C = 1, release's dialect" in shown and "clip.mp4, frame 2" in shown
    found = json.loads((out / "compression.json").read_text())
    assert [row["picture"] for row in found["pictures"]] == [
        "a.png",
        "clip.mp4, frame 1",
        "clip.mp4, frame 2",
    ]
    assert np.shape(found["pictures"][0]["map"]) == (1, 4, 4)
    assert np.asarray(Image.open(out / "compression.png")).std() > 5


def test_what_cannot_be_used(llava_json, tmp_path, capsys, monkeypatch):
    folder = str(tiny_model.folder("release"))
    for words, said in (
        (["compression", folder], "no image is given"),
        (["attention", folder, "--limit", "0"], "--limit is 0"),
        (["attention", folder, "--data", str(tmp_path / "no.json")], "no such file"),
        (
            [
                "compression",
                str(tiny_model.folder("llava-1.5")),
                "--image",
                str(tmp_path / "a.png"),
            ],
            "has no queries",
        ),
    ):
        assert main(["analyze", *words, "--no-plots", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", "attention", folder]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err
