"""Runs that are killed, stopped, or short of disk: they end as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from llava_mini_jax.training import loop
from tests import tiny
from tests.training import nested_stage, one_stage, tiny_stages
from tests.training.runs import (
    assert_same,
    copied,
    metric_lines,
    metrics_of,
    output,
    program,
    run,
    saved_steps,
)

fast_compilation = tiny.fast_compilation

# Dies in the last stage, while its fourth step is being saved.
KILLED_RUN = """
import os, signal, sys
from llava_mini_jax.training import loop
from llava_mini_jax.training.checkpoint import Checkpoints
from tests.training import tiny_stages

def save_and_die(self, step, state, about):
    save(self, step, state, about)
    if (about["stage"], step) == ("stage2", 4):
        os.kill(os.getpid(), signal.SIGKILL)

save, Checkpoints.save = Checkpoints.save, save_and_die
loop.run(tiny_stages.stages(), sys.argv[1])
"""


def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2", "stage2")
    status, _, err = output(program(KILLED_RUN, folder))
    assert status == -signal.SIGKILL, err
    # Step 4 was perhaps not written yet. Either way, no half of it may be taken for a whole.
    assert saved_steps(folder, "stage2") in ([2], [2, 4])
    half = folder / "checkpoints" / "stage2" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half of a file")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "step": 6, "loss": 9.0}\n{"stage": "sta')
    assert not (folder / "stage2").exists()
    finals = run(tiny_stages.stages(), folder)
    assert finals["stage2"].compiled == 1
    assert metrics_of(folder) == metrics_of(finished[0])
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)
    assert saved_steps(folder, "stage2") == [6, 8]


def test_a_damaged_run_continues_from_the_step_before_to_the_same_bits(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "stage2")
    newest = folder / "checkpoints" / "stage2" / "8"
    for file in (newest / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finals = run(tiny_stages.stages(), folder)
    assert "continuing from step 6" in capsys.readouterr().err
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)


@pytest.mark.slow
def test_drawn_counts_of_vision_tokens_go_on_to_the_same_bits(tmp_path):
    """From the checkpoint of step 2: draws and losses of each count, too."""
    stage, half = nested_stage.config(), tmp_path / "half"
    whole = run([stage], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / stage.name / "4")
    shutil.rmtree(half / stage.name)
    finals = run([stage], half)
    assert_same(finals[stage.name].params, whole[stage.name].params)
    told, again = (metric_lines(folder) for folder in (tmp_path / "whole", half))
    assert [line["step"] for line in told] == [line["step"] for line in again] == [1, 2, 3, 4]
    names = [f"{what}_at_{n}" for n in (0, 1, 4, 9) for what in ("rows", "loss")]
    for ours, theirs in zip(told, again, strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        assert sum(ours[f"rows_at_{n}"] for n in (0, 1, 4, 9)) == stage.batch_size
    assert len({line["rows_at_4"] for line in told}) > 1  # drawn anew each step


def test_sigterm_ends_a_run_with_a_checkpoint_and_the_status_asked_for(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2", "stage2")
    status, out, err = output(program(STOPPED_RUN, folder))
    assert status == 5, err
    assert "stage2 stopped at step 3 of 8" in out
    assert saved_steps(folder, "stage2") == [2, 3]
    finals = run(tiny_stages.stages(), folder)
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)


# Asks itself to stop at the second step of the last stage: the third one hears of it.
STOPPED_RUN = """
import os, signal, sys
import train
from llava_mini_jax.training import loop, stages
from llava_mini_jax.training.xprof import ProfileConfig
from tests.training import tiny_stages

put_batch, batches = loop.sharding.put_batch, 0

def put_and_ask(batch):
    global batches
    batches += 1
    if batches == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return put_batch(batch)

loop.sharding.put_batch = put_and_ask
stages.load_config = lambda path: None
stages.stages_of = lambda config: tiny_stages.stages()
train.parse = lambda default, argv: train.Command(None, argv[1], False, False, 5, ProfileConfig())
sys.exit(train.main(["config.py", sys.argv[1]]))
"""


def test_batches_that_nobody_takes_do_not_hold_up_the_end(tmp_path):
    status, out, err = output(program(SLOW_DATA, tmp_path))
    assert (status, err.count("Traceback")) == (5, 0), err
    assert "stage2 stopped at step 1 of 20" in out
    assert saved_steps(tmp_path, "stage2") == [1]
    (said,) = (line.split()[-1] for line in err.splitlines() if line.startswith("ended at "))
    assert time.monotonic() - float(said) < SLEEP


# After five batches a row takes a minute: so many are on their way when the first is waited for,
# and on a busy machine it may be read last. Before the first step the run is asked to stop.
SLEEP = 60
SLOW_DATA = """
import os, runpy, signal, sys, time
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.training import feed, loop

encoded, encode = 0, Encoder.__call__

def slowly(self, sample):
    global encoded
    encoded += 1
    if encoded > 40:
        time.sleep(SLEEP)
    return encode(self, sample)

def receive(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    return received(*given)

def run(*given):
    try:
        run_stages(*given)
    finally:
        print("ended at", time.monotonic(), file=sys.stderr)

Encoder.__call__ = slowly
received, feed.receive = feed.receive, receive
run_stages, loop.run = loop.run, run
sys.argv = ["train.py", "tests/training/one_stage.py", "--workdir", sys.argv[1], *OPTIONS]
runpy.run_path("train.py", run_name="__main__")
""".replace("SLEEP", str(SLEEP)).replace("*OPTIONS", '"--stopped-status", "5"')


FULL = """resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))"""
READ_ONLY = """os.setuid(65534)"""  # a user who may write nothing


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(FULL, id="full disk"),
        pytest.param(
            READ_ONLY,
            id="read-only",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user"),
            ],
        ),
    ],
)
def test_what_cannot_be_written_ends_a_run_with_a_sentence_and_whole_checkpoints(tmp_path, event):
    status, out, err = output(program(UNWRITABLE.replace("EVENT", event), tmp_path))
    assert (status, out) == (2, ""), err
    # Threads of the checkpoint's writer may say their own last words beside it, even before it.
    (said,) = [line for line in err.splitlines() if "train.py: " in line]
    assert "cannot be written (" in said and "make room" in said
    assert saved_steps(tmp_path, "stage2") == [10]
    loop.run([one_stage.config()], str(tmp_path))
    assert [step for _, step in metrics_of(tmp_path)] == [*range(1, 21)]


# Something happens to the disk once the first checkpoint is there.
UNWRITABLE = """
import os, resource, runpy, signal, sys
from llava_mini_jax.training.checkpoint import Checkpoints

def save(self, step, state, about):
    if step == 20:
        self._manager.wait_until_finished()
        EVENT
    write(self, step, state, about)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, Checkpoints.save = Checkpoints.save, save
sys.argv = ["train.py", "tests/training/one_stage.py", "--workdir", sys.argv[1], "--log-every", "1"]
runpy.run_path("train.py", run_name="__main__")
"""


# One stage of 1000 steps, saved every tenth, in a process of its own.
LONG_RUN = """
import dataclasses, sys
from llava_mini_jax.training import loop
from tests.training import tiny_stages

first = tiny_stages.stages()[0]
loop.run([dataclasses.replace(first, steps=1000, checkpoint_every=10, log_every=10)], sys.argv[1])
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    def start(folder):
        return program(LONG_RUN, folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    moments = random.Random(0)
    kills, reached = 0, set()
    for _ in range(20):
        running = start(tmp_path / "killed")
        try:
            running.wait(moments.uniform(1, 8))
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
        saved = tmp_path / "killed" / "checkpoints" / "captions"
        if saved.is_dir():
            reached |= {int(path.name) for path in saved.iterdir() if path.name.isdigit()}
    assert start(tmp_path / "killed").wait() == 0
    assert kills >= 10 and len(reached) > 4  # the moments lay in start-up, in steps and in saves
    whole, killed = (tmp_path / name / "captions" / "model" for name in ("whole", "killed"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in killed.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
