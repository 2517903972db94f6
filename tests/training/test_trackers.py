"""W&B and trackio are told what TensorBoard is told, by the first process alone, and take up their
runs again; a stand-in with their interface takes their place."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import loop, trackers
from llava_mini_jax.training.metrics import Counted, Metrics
from llava_mini_jax.training.trackers import TrackConfig
from tests import tiny
from tests.training import tiny_stages
from tests.training.runs import metrics_of

fast_compilation = tiny.fast_compilation

BOTH = TrackConfig(to=("wandb", "trackio"), project="pages")


class Package(types.ModuleType):
    """Of the interface that wandb and trackio share, what is used; it knows earlier runs."""

    def __init__(self, name: str):
        super().__init__(name)
        self.runs: dict[str, list[Any]] = {}  # by name: what was logged, and None at each end
        self.begun: list[dict[str, Any]] = []
        self.broken = ""

    def init(self, **given: Any) -> "Package":
        if self.broken == "init":
            raise ConnectionError("no route\nto host")
        assert given["resume"] == "allow"
        self.begun.append(given)
        self.current = self.runs.setdefault(given.get("id", given["name"]), [])
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken == "log":
            raise RuntimeError("disk full")
        self.current.append((step, values))

    def finish(self) -> None:
        self.current.append(None)


@pytest.fixture
def packages(monkeypatch) -> dict[str, Package]:
    found = {name: Package(name) for name in BOTH.to}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


STAGE = tiny_stages.stages()[0]


def logged(workdir: Path, step: int, cfg: TrackConfig = BOTH, stage: Any = STAGE) -> dict[str, Any]:
    """One step of a run, as the loop logs it; the line of metrics.jsonl."""
    workdir.mkdir(exist_ok=True)
    begun = trackers.begin(cfg, epath.Path(workdir), stage)
    with Metrics(epath.Path(workdir), stage.name, 9, step - 1, begun) as metrics:
        values = dict(loss=1.5, tokens=2, right_tokens=1, grad_norm=float("nan"))
        metrics.add(values | dict(skipped=0, skipped_in_a_row=0), Counted(4, 40, 8, 2e12, 0.5))
        metrics.log(step, {"learning_rate": 0.1})
        metrics.log_heldout(step, {"loss": 2.5})
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if line["step"] == step and "loss" in line)


def test_they_are_told_what_metrics_jsonl_says(packages, tmp_path):
    line = logged(tmp_path, 5)
    for package in packages.values():
        (run,) = package.runs.values()
        (step, training), (step_too, heldout), end = run
        assert (step, step_too, end) == (5, 5, None) and heldout == {"heldout/loss": 2.5}
        expected = {f"training/{n}": v for n, v in line.items() if v is not None}
        assert training == {n: v for n, v in expected.items() if n[9:] not in ("stage", "step")}
        assert "training/loss" in training and "training/grad_norm" not in training
        (begun,) = package.begun
        assert begun["project"] == "pages" and begun["config"]["name"] == STAGE.name
    assert packages["wandb"].begun[0]["dir"] == str(tmp_path)


def test_a_workdir_that_is_continued_goes_on_with_its_runs(packages, tmp_path):
    for step in (1, 2):
        logged(tmp_path / "one run", step)
    other = dataclasses.replace(STAGE, name="another")
    logged(tmp_path / "one run", 1, stage=other)
    logged(tmp_path / "second", 1)
    for package in packages.values():
        ends = [sum(told is None for told in run) for run in package.runs.values()]
        assert ends == [2, 1, 1]
        names = [*package.runs]
        assert names[0].startswith("one-run-") and names[0].endswith(STAGE.name)
        assert names[1] == names[0].removesuffix(STAGE.name) + "another"


def test_nothing_is_tracked_unless_asked_for(tmp_path, monkeypatch):
    for name in BOTH.to:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for cfg in (None, TrackConfig()):
        trackers.check(cfg)
        assert trackers.begin(cfg, epath.Path(tmp_path), STAGE) == []
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_alone_tracks(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers.check(BOTH)  # others need no packages
    assert trackers.begin(BOTH, epath.Path(tmp_path), STAGE) == []
    assert packages["trackio"].begun == [] and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_sentence_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"pip install 'llava-mini-jax\[trackio\]'") as refused:
        trackers.check(TrackConfig(to=("trackio",)))
    assert "\n" not in str(refused.value)


def test_a_run_that_cannot_begin_is_one_sentence(packages, tmp_path):
    packages["wandb"].broken = "init"
    with pytest.raises(InputError, match=r"wandb cannot start .*no route to host.*WANDB_MODE"):
        trackers.begin(BOTH, epath.Path(tmp_path), STAGE)


def test_a_tracker_that_fails_later_does_not_end_the_run(packages, tmp_path, capsys):
    packages["wandb"].broken = "log"
    assert logged(tmp_path, 1)["loss"] == 1.5
    (run,) = packages["trackio"].runs.values()
    assert len(run) == 3
    told = capsys.readouterr().err
    assert told.count("wandb failed at step 1 (disk full) and gets no more") == 1


def test_a_run_and_one_that_goes_on_tell_them(packages, tmp_path):
    stage = dataclasses.replace(STAGE, steps=4)
    loop.run([stage], str(tmp_path), track=BOTH)
    shutil.rmtree(tmp_path / "checkpoints" / stage.name / "4")
    shutil.rmtree(tmp_path / stage.name)
    loop.run([stage], str(tmp_path), track=BOTH)
    for package in packages.values():
        (run,) = package.runs.values()
        first, second = run[: run.index(None)], run[run.index(None) + 1 : -1]
        losses = {step: told["training/loss"] for step, told in first}
        written = metrics_of(tmp_path)
        assert losses == {step: line[0] for (_, step), line in written.items()}
        assert second and {step for step, _ in second} < set(losses)
        assert all(told["training/loss"] == losses[step] for step, told in second)
