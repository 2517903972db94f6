"""--json: one document on stdout, the numbers of the tables; everything else is on stderr."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from llava_mini_jax import cli, terminal
from llava_mini_jax.evaluation.benchmark import all_names
from llava_mini_jax.reproduce import verify as verify_module
from llava_mini_jax.reproduce.check import Check
from tests import tiny_model
from tests.conftest import ROOT

Documented = Callable[..., Any]


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Documented:
    """What a command prints with --json, of what the standard of JSON has (NaN is none of it)."""
    monkeypatch.chdir(ROOT)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    def document(*words: object, status: int = 0) -> Any:
        assert cli.main([*map(str, words), "--json"]) == status
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out, parse_constant=refuse)

    return document


def test_numbers_that_are_none_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": [math.nan, 1.5], "b": (math.inf,), "path": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None], "path": "x"}


def test_inspect(document: Documented) -> None:
    folder = tiny_model.folder("paper")
    arrays = load_file(folder / "model.safetensors").values()
    found = document("inspect", folder)
    size = sum(array.size for array in arrays)
    assert found["components"]["total"]["parameters"] == size
    assert found["components"]["total"]["bytes"] == 4 * size
    assert found["components"]["total"]["device_bytes"] is None
    own = found["parameters"]["llm/layers/q_proj"]
    assert own["shape"] == [1, 4, 8, 32] and own["trained"] == {"stage 1": False, "stage 2": True}
    assert found["dialect"] == "paper" and found["config"]["model.llm.vocab_size"] == 85
    split = document("inspect", "--abstract", "vicuna-7b", "--mesh", "fsdp=4,tensor=2")
    total = split["components"]["total"]
    assert total["device_bytes"] < total["bytes"] / 7
    assert split["parameters"]["llm/layers/down_proj"]["sharding"] == "-,fsdp,tensor"


def test_plan(document: Documented, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("plan", "video", "llama-3.1-8b", "--frames", "10800", "--dtype", "int8")
    found = document(*command)
    assert cli.main(list(command)) == 0
    shown = capsys.readouterr().out
    assert f"positions      {found['positions']['needed']:,} = " in shown
    assert f"{found['device']['bytes'] / 1e9:,.3f} GB at the peak" in shown
    assert sum(found["device"]["terms"].values()) == found["device"]["bytes"]
    training = ("plan", "training", "configs/stage1_vicuna_7b.py")
    rows = document(*training)
    assert cli.main(list(training)) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    for row, line in zip(rows, table, strict=True):
        total = f"{row['bytes']['total'] / 2**30:.1f}"
        end = f"| {total} | {'yes' if row['fits'] else 'no'} |"
        assert line.endswith(end) and row["hardware"] in line


def test_data_verify(document: Documented, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    samples: Sequence[dict] = [
        {"id": "good", "conversations": talk},
        {"id": "bad", "image": "gone.png", "conversations": talk},
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    report = tmp_path / "report.json"
    found = document("data", "verify", tmp_path / "data.json", "--report", report, status=1)
    assert [one["id"] for one in found["rejected"]] == ["bad"]
    assert json.loads(report.read_text()) == found


def test_data_speed(document: Documented) -> None:
    rows = document("data", "speed", "configs/digits.py", "--threads", "1", "--batches", "1")
    assert {"captions", "stage1", "stage2"} <= {row["stage"] for row in rows}
    assert all(row["threads"] == 1 and row["samples"] > 0 for row in rows)


def test_benchmarks(document: Documented, tmp_path: Path) -> None:
    found = document("benchmarks")
    assert [each["name"] for each in found] == list(all_names())
    (pope,) = document("benchmarks", "pope", "--data", tmp_path)
    assert pope["paper"] and pope["files"]
    assert all(file["there"] is False and file["from"] for file in pope["files"].values())


def test_verify(document: Documented, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: Path):
        if case.name == "crash":
            raise KeyError("logits")
        yield Check("logits", (2, 3), math.nan, 1e-4)

    monkeypatch.setattr(verify_module, "verify", fake)
    crash, odd = document("verify", "crash", "odd", status=1)
    assert crash == {"case": "crash", "failure": "KeyError: 'logits'", "arrays": []}
    assert odd["failure"] is None
    assert odd["arrays"] == [
        {"array": "logits", "shape": [2, 3], "error": None, "tolerance": 1e-4, "passed": False}
    ]


@pytest.mark.slow
def test_profile_requests(document: Documented) -> None:
    words = ("--requests", "2", "--slots", "2", "--new-tokens", "4", "--repeats", "1")
    found = document("profile", "requests", tiny_model.folder("paper"), *words)
    assert found["requests"] == found["equal"] == found["slots"] == 2
    assert len(found["engine"]) == len(found["batches"]) == 1
