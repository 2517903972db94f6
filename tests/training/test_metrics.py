"""Metrics: means over steps that were taken, speeds, and a journal that survives kills."""

import dataclasses
import json
import resource
import signal
from typing import Any

import numpy as np
import pytest
from etils import epath

from llava_mini_jax import terminal
from llava_mini_jax.cost import chips
from llava_mini_jax.data.digits.pages import DigitsConfig, build_tokenizer
from llava_mini_jax.journal import Journal
from llava_mini_jax.training import heldout
from llava_mini_jax.training import metrics as metrics_file
from llava_mini_jax.training.metrics import Counted, Metrics
from llava_mini_jax.training.stages import HeldOut
from llava_mini_jax.training.tensorboard import Board
from tests.training import tiny_stages


def logged(tmp_path, steps):
    """(what `log` returns, what it writes) of steps (loss, tokens, skipped_in_a_row)."""
    tmp_path.mkdir(exist_ok=True)
    with Metrics(epath.Path(tmp_path), "stage", len(steps), 0) as metrics:
        for loss, tokens, streak in steps:
            values = dict(loss=loss, tokens=tokens, right_tokens=1, grad_norm=loss, z_loss=2 * loss)
            values |= dict(skipped=int(streak > 0), skipped_in_a_row=streak)
            metrics.add(values, Counted(4, positions=40, images=8, flops=2e12, waited=0.5))
        returned = metrics.log(len(steps), {"learning_rate": 0.1})
    return returned, json.loads((tmp_path / "metrics.jsonl").read_text())


def test_skipped_steps_are_counted_and_kept_out_of_the_means(tmp_path):
    nan = float("nan")
    steps = [(nan, 9, 3), (1.0, 2, 0), (nan, 9, 1), (nan, 9, 2), (4.0, 1, 0)]
    returned, written = logged(tmp_path, steps)
    expected = dict(loss=2.0, token_accuracy=2 / 3, grad_norm=2.5, z_loss=4.0)
    expected |= dict(skipped=3, skipped_in_a_row=3)
    for values in (returned, written):
        assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_a_log_is_a_line_where_stderr_is_no_terminal(tmp_path, capsys):
    logged(tmp_path, [(1.5, 2, 0)] * 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stage  step 5 of 5  loss 1.500  ") and line.endswith(" s a step")


def test_a_curve_is_the_means_of_its_columns():
    lines = terminal.curve([(step, float(-step)) for step in range(1, 129)], width=64, height=4)
    label, drawn = zip(*(line.split("│") for line in lines[:4]), strict=True)
    assert [word.strip() for word in label] == ["-1.5", "", "", "-128"]
    assert {len(row) for row in drawn} == {64}
    assert drawn[0][0] == "█" and drawn[0][-1] == " " and drawn[-1][-1] == "▁"
    # Every column is one rise, from below: full, one part of a line, nothing.
    for column in zip(*drawn, strict=True):
        assert "".join(column).lstrip(" ").lstrip("▁▂▃▄▅▆▇█") == ""
        assert all(below == "█" for below in "".join(column).strip(" ")[1:])
    assert lines[-1].split() == ["1", "128"]
    assert terminal.curve([(1, 2.0)]) == []
    flat = terminal.curve([(10, 1.0), (20, 1.0), (90, 1.0)], height=2)
    assert flat[1].endswith("▁▁▁") and flat[0].strip() == "1 │"


def test_the_loss_of_a_stage_is_drawn_at_its_end(tmp_path, capsys):
    logged(tmp_path, [(4.0, 2, 0)] * 5)
    capsys.readouterr()
    with Metrics(epath.Path(tmp_path), "stage", 9, 5) as metrics:  # continues
        values = dict(loss=1.0, tokens=2, right_tokens=1, grad_norm=1.0)
        metrics.add(values | dict(skipped=0, skipped_in_a_row=0), Counted(4, 40, 8, 2e12, 0.5))
        metrics.log(9, {})
    metrics.show_curve()
    _, title, first, *_, last = capsys.readouterr().err.splitlines()
    assert title == "stage: loss" and first.startswith("4 │") and last.split() == ["5", "9"]


def test_steps_with_nothing_supervised_are_told(tmp_path, capsys):
    empty = (0.0, 0, 0)  # as step.py has it
    returned, written = logged(tmp_path / "mixed", [empty, (1.5, 2, 0), empty])
    for values in (returned, written):
        assert (values["loss"], values["grad_norm"], values["unsupervised"]) == (1.5, 1.5, 2)
        assert (values["supervised_tokens"], values["skipped"]) == (2, 0)
    assert "loss 1.500 (nothing supervised in 2 steps)  " in capsys.readouterr().err
    returned, written = logged(tmp_path / "empty", [empty] * 3)
    assert np.isnan(returned["loss"]) and np.isnan(returned["grad_norm"])
    assert (written["loss"], written["token_accuracy"], written["unsupervised"]) == (None, None, 3)
    told = capsys.readouterr().err
    assert "no loss: nothing supervised in 3 steps  " in told and "nan" not in told
    logged(tmp_path / "both", [empty, (float("nan"), 9, 1)])
    told = capsys.readouterr().err
    why = "nothing supervised in 1 step, no finite loss or gradient in 1 step"
    assert f"no loss: {why}  " in told and "nan" not in told


def test_a_log_of_skipped_steps_alone_is_still_json(tmp_path):
    returned, written = logged(tmp_path, [(float("nan"), 9, 10), (float("inf"), 9, 11)])
    assert np.isnan(returned["loss"])
    assert written["loss"] is None and written["grad_norm"] is None
    assert (written["skipped"], returned["skipped_in_a_row"]) == (2, 11)


def test_speeds_are_of_all_processes_and_devices(tmp_path, monkeypatch):
    """One device of a known kind stands in for the CPU's eight."""
    monkeypatch.setattr(metrics_file, "peak_flops", lambda kind: chips.peak_flops("TPU v4"))
    monkeypatch.setattr(metrics_file.jax, "device_count", lambda: 2)
    _, written = logged(tmp_path, [(1.0, 2, 0)] * 3)
    seconds = 3 * written["step_seconds"]
    assert written["examples_per_second"] == pytest.approx(12 / seconds)
    assert written["tokens_per_second"] == pytest.approx(120 / seconds)
    assert written["images_per_second"] == pytest.approx(24 / seconds)
    assert written["model_tflops_per_second"] == pytest.approx(6 / seconds)
    assert written["model_flop_utilisation"] == pytest.approx(6 / seconds / (2 * 275))
    assert (written["data_wait_seconds"], written["learning_rate"]) == (0.5, 0.1)


def test_a_journal_keeps_what_is_wanted_and_drops_half_a_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    journal = Journal(path, lambda line: True)
    assert not path.exists()
    for step in range(5):
        journal.append({"step": step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    before = path.read_bytes()
    only_read = Journal(path, lambda line: line["step"] < 3, write=False)
    only_read.append({"step": 9})
    assert path.read_bytes() == before
    assert [line["step"] for line in only_read.lines] == [0, 1, 2, 9]
    Journal(path, lambda line: line["step"] < 3).append({"step": 7})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_journal_in_a_bucket_is_written_whole(tmp_path, monkeypatch):
    """Buckets have no appending: the file is replaced each time."""
    monkeypatch.setattr(epath, "Path", lambda path: path)
    path = tmp_path / "lines.jsonl"
    journal = Journal(Stub(path), lambda line: True)
    journal.append({"step": 1})
    journal.append({"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


class Stub:
    """A path that calls itself a bucket's and refuses to be appended to."""

    def __init__(self, path):
        self._path = path

    def __str__(self):
        return f"gs://{self._path}"

    def __getattr__(self, name):
        assert name != "open"
        return getattr(self._path, name)


def test_a_full_disk_is_told_and_not_waited_for(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    board = Board(epath.Path(tmp_path), 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError):
            for step in range(100):
                board.add({"training/loss": 1.0, "training/grad_norm": 2.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_held_out_data_with_nothing_supervised_has_no_figure(tmp_path, monkeypatch, capsys):
    heldout_cfg = HeldOut(data=DigitsConfig(split="heldout", samples=4), batches=1, every=1)
    stage = dataclasses.replace(tiny_stages.stages()[0], heldout=heldout_cfg)
    nothing = dict.fromkeys(("cross_entropy", "tokens", "right_tokens", "z_loss"), 0)
    monkeypatch.setattr(heldout, "heldout_sums", lambda *_, **__: nothing)
    evaluate = heldout.evaluator(stage, build_tokenizer(), epath.Path(tmp_path), 0)
    state: Any = None
    with Metrics(epath.Path(tmp_path), "stage", 1, 0) as metrics:
        metrics.log_heldout(1, evaluate(1, state))
    assert "held-out" in capsys.readouterr().err
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (written["heldout_loss"], written["heldout_token_accuracy"]) == (None, None)
