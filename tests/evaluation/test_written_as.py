"""What a template makes of prompts belongs to the settings of answers, the day included."""

import json
import shutil
from pathlib import Path

import pytest

from llava_mini_jax.data.text import chat_template
from tests import tiny, tiny_model
from tests.evaluation.test_evaluate import data, options, status_of  # noqa: F401

fast_compilation = tiny.fast_compilation
DATED = (
    "{% for m in messages %}{{ strftime_now('%d %b') }} {{ m.role }} {{ m.content }}</s>"
    "{% endfor %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_model.folder("paper"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "today", lambda: day)


def test_a_run_goes_on_as_on_its_first_day(
    model: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    on("2026-02-03", monkeypatch)
    words = options(model, data, out, "--conv-mode", "chat")
    assert status_of([*words, "--limit", "1"]) == 0
    (path,) = out.glob("*/pope/settings.json")
    before = json.loads(path.read_text())
    assert before["model"]["prompt"]["date"] == "2026-02-03"
    on("2026-02-04", monkeypatch)
    assert status_of([*words, "--limit", "2"]) == 0, "the same prompts, so the same run"
    assert json.loads(path.read_text()) == before
    other = tmp_path / "other"
    assert status_of(options(model, data, other, "--conv-mode", "chat", "--limit", "1")) == 0
    (path,) = other.glob("*/pope/settings.json")
    now = json.loads(path.read_text())
    assert now["model"]["prompt"]["date"] == "2026-02-04"
    assert now["model"]["written_as"] != before["model"]["written_as"]


def test_another_chat_template_makes_other_prompts(
    model: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = options(model, data, tmp_path / "out", "--conv-mode", "chat", "--limit", "1")
    assert status_of(words) == 0
    (model / "chat_template.jinja").write_text(DATED.replace("%b", "%B"))
    assert status_of(words) == 2
    assert "made with other settings (model)" in capsys.readouterr().err
