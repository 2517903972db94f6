"""Jobs as processes: order, failures, what a stop leaves; one table for real (slow)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_mini_jax.cli.reproduce import _shortened
from llava_mini_jax.errors import InputError
from llava_mini_jax.reproduce import runs, scales

CONFIGS = Path(__file__).parents[2] / "configs"


def pretend(job, out, data, limit, cores):
    """A job's process: notes when it began and ended, and leaves what makes it done."""
    folder = out / job.name
    folder.mkdir(parents=True)
    if job.name == "mini-seed1":
        (folder / "log.txt").write_text("something else\nno room is left\n")
        sys.exit(1)
    with (out / "order").open("a") as file:
        file.write(f"+{job.name} {sorted(cores)}\n")
    time.sleep(0.2)
    with (out / "order").open("a") as file:
        file.write(f"-{job.name}\n")
    done = job.results(out) if job.benchmarks else job.model(out)
    done.parent.mkdir(parents=True)
    result = {
        "benchmark": "digits",
        "value": 62.5,
        "headline": "exact",
        "rules": {"exact": {"details": {}}},
        "settings": {"limit": None},
    }
    done.write_text(json.dumps([result]))


def plan(out, seeds, rows=("llava", "mini")):
    return scales.plan("digits", CONFIGS, rows, seeds, out)


def test_jobs_run_after_what_they_need_and_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_do", pretend)
    jobs = plan(tmp_path, (0,)).jobs
    runs.run(jobs, tmp_path, workers=2, data=tmp_path)
    order = [line.split()[0] for line in (tmp_path / "order").read_text().splitlines()]
    assert len(order) == 8
    for name, job in jobs.items():
        if job.needs:
            assert order.index(f"-{job.needs}") < order.index(f"+{name}")
    assert "mini-seed0: 62.5, " in capsys.readouterr().out
    runs.run(jobs, tmp_path, workers=2, data=tmp_path)  # nothing is left to do
    assert len((tmp_path / "order").read_text().splitlines()) == 8


def test_a_job_that_fails_says_why_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_do", pretend)
    jobs = plan(tmp_path, (1,)).jobs
    with pytest.raises(InputError, match=r"mini-seed1 failed: no room is left \(its log: .*log"):
        runs.run(jobs, tmp_path, workers=1, data=tmp_path)
    assert jobs["llava-seed1"].is_done(tmp_path) and not jobs["mini-seed1"].is_done(tmp_path)


def test_what_does_not_need_a_job_that_fails_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_do", pretend)
    jobs = plan(tmp_path, (1,), rows=("mini", "llava")).jobs
    assert list(jobs)[-1] == "llava-seed1"  # behind the one that fails
    with pytest.raises(InputError, match=r"mini-seed1 failed: no room is left"):
        runs.run(jobs, tmp_path, workers=1, data=tmp_path)
    assert {name for name in jobs if not jobs[name].is_done(tmp_path)} == {"mini-seed1"}


def killed(job, out, data, limit, cores):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_that_is_killed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_do", killed)
    jobs = plan(tmp_path, (0,)).jobs
    said = "start failed: it was ended by SIGKILL, as is done where memory runs out"
    with pytest.raises(InputError, match=said):
        runs.run(jobs, tmp_path, workers=1, data=tmp_path)


def endless(job, out, data, limit, cores):
    (out / "pid").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(600)


def test_sigterm_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_do", endless)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        runs.run(plan(tmp_path, (0,)).jobs, tmp_path, workers=1, data=tmp_path)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_missing_data_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_do", pretend)
    jobs = scales.plan("full", CONFIGS, ("mini",), (0,), tmp_path).jobs
    with pytest.raises(InputError, match="nowhere"):
        runs.run(jobs, tmp_path, workers=1, data=Path("nowhere"))
    assert not (tmp_path / "order").exists()


def test_cores_are_shared_out():
    cores = os.sched_getaffinity(0)
    shares = runs._shares(len(cores))
    assert set.union(*shares) == cores and sum(map(len, shares)) == len(cores)
    assert runs._shares(len(cores) + 1) == [set()] * (len(cores) + 1)


@pytest.mark.slow
def test_a_row_whose_compressor_reads_questions_is_trained_and_asked(tmp_path):
    """Its steps are counted by the question's length, and its folder has a second tokenizer."""
    made = _shortened(scales.plan("digits", CONFIGS, ("vid",), (0,), tmp_path), 2)
    runs.run(made.jobs, tmp_path, workers=1, data=tmp_path, limit=4)
    assert all(job.is_done(tmp_path) for job in made.jobs.values())


@pytest.mark.slow
def test_a_table_is_stopped_and_finished(tmp_path):
    """Ctrl-C in the middle of training, then the same command: it goes on and writes the page."""
    command = [
        sys.executable,
        "-c",
        "import signal, sys; from llava_mini_jax.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "sys.exit(main())",
    ]
    command += ["reproduce", "table11", "--seeds", "0", "--steps", "40", "--limit", "8"]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=CONFIGS.parent, env=environment)
    steps = tmp_path / "start" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not steps.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    ended = subprocess.run(
        command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert "whole-seed0: " in ended.stdout and "in the paper: holds (+1.4)" in ended.stdout
    assert "A trial: 40 steps a stage, 8 questions" in (tmp_path / "table11.md").read_text()
