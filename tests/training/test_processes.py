"""Two real processes of four devices each: the same run as one process, and what ends it."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import loop
from tests import tiny
from tests.conftest import ROOT
from tests.training import one_stage
from tests.training.runs import SETTINGS, metrics_of, saved_steps

fast_compilation = tiny.fast_compilation
pytestmark = pytest.mark.slow  # a minute; .ci/run has a step for them

# Sums of float32 in another order: 2e-7 was seen over 20 steps.
LOSS_RTOL = 1e-6
CONFIG = "tests/training/one_stage.py"


def start(workdir, *options, config=CONFIG, command=None):
    """The two processes of a run, or of another command, not waited for."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = {name.upper(): str(jax.config.values[name]) for name in SETTINGS}
    settings |= {"JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": address}
    command = command or [sys.executable, "train.py", config, "--distributed", "--workdir"]
    return [
        subprocess.Popen(
            [*command, str(workdir), *options],
            env=os.environ | settings | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def ended(processes, status=0):
    """What the processes said, once both have ended with this status."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, "\n".join(said)
    return said


def losses(folder):
    return {step: loss for (_, step), (loss, *_) in metrics_of(folder).items()}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for step, loss in ours.items():
        assert abs(loss / theirs[step] - 1) <= LOSS_RTOL, step


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of 20 steps on 2 x 4 devices."""
    folder = tmp_path_factory.mktemp("two")
    ended(start(folder, "--mesh.data", "2", "--mesh.fsdp", "4"))
    return folder


def one(folder, **mesh):
    stage = dataclasses.replace(one_stage.config(), mesh=MeshConfig(**mesh))
    loop.run([stage], str(folder))
    return losses(folder)


def test_two_processes_have_the_losses_of_one(two, tmp_path):
    found = losses(two)
    assert list(found) == list(range(1, 21))
    assert_close(found, one(tmp_path / "mesh", data=2, fsdp=4))
    assert_close(found, one(tmp_path / "alone"))
    assert saved_steps(two, "stage2") == [10, 20]


def test_a_checkpoint_of_two_processes_continues_on_one(two, tmp_path):
    for name, mesh in {"eight": dict(fsdp=8), "alone": {}}.items():
        folder = tmp_path / name
        shutil.copytree(two, folder)
        shutil.rmtree(folder / "checkpoints/stage2/20")
        shutil.rmtree(folder / "stage2")
        continued = one(folder, **mesh)
        assert_close(continued, losses(two))
        assert (folder / "stage2/model/model.safetensors").is_file()


def test_sigterm_to_one_process_ends_both_with_a_checkpoint_of_the_same_step(tmp_path):
    """And samples that either of them finds broken are in one list."""
    pages = DigitsPages(one_stage.config().data, 64)
    rows = []
    for index in range(64):
        item = pages[index]
        rows.append({**item, "image": f"missing-{index}.png"} if index % 3 else text_only(item))
    (tmp_path / "pages.json").write_text(json.dumps(rows))
    config = tmp_path / "config.py"
    config.write_text(OF_FILES.format(path=str(tmp_path / "pages.json")))
    folder = tmp_path / "run"
    processes = start(folder, "--mesh.data", "2", "--mesh.fsdp", "4", config=str(config))
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes)
    (step,) = saved_steps(folder, "stage2")
    assert all(f"stage2 stopped at step {step} of 5000" in text for text in said)
    assert step == max(losses(folder))
    found = list(map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines()))
    broken = {rows[index]["id"] for index in range(64) if index % 3}
    assert sorted(line["id"] for line in found) == sorted(broken)


@pytest.mark.parametrize("event", ["damaged", "unreadable by one"])
def test_all_processes_take_the_same_checkpoint(tmp_path, event):
    """Whether a file was damaged, or one process alone has an error; and they go on from there."""
    said = ended(start(tmp_path, event, command=[sys.executable, "-c", RESUMED]))
    for text in said:
        assert "resumed from 1 with 1.0, there are [1]" in text and "saved [1, 2]" in text, text
    assert sum("continuing from step 1" in text for text in said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "damaged-2"]


def test_workdirs_that_are_not_the_same_disk_are_told_before_the_first_step(tmp_path):
    processes = start("unused", "--mesh.data", "2", "--mesh.fsdp", "4", config=CONFIG,
                      command=[sys.executable, "-c", OTHER_WORKDIRS, str(tmp_path)])  # fmt: skip
    for text in ended(processes, status=2):
        assert "of process 1 is not that of process 0" in text and "that all machines share" in text
    assert not list(tmp_path.rglob(".shared-*")) and not list(tmp_path.rglob("config.json"))


OTHER_WORKDIRS = """
import os, sys
from llava_mini_jax.training import workdir
import train
workdir._SEEN_WITHIN = 1.0
folder, own = sys.argv[1], os.environ["JAX_PROCESS_ID"]
sys.exit(train.main([CONFIG, "--distributed", "--workdir", f"{folder}/{own}", *sys.argv[3:]]))
""".replace("CONFIG", repr(CONFIG))


def test_what_one_process_refuses_all_do(tmp_path):
    (tmp_path / "rows.json").write_text(
        json.dumps([text_only(DigitsPages(one_stage.config().data, 1)[0])])
    )
    config = tmp_path / "config.py"
    config.write_text(OF_OTHER_FILES.format(path=str(tmp_path / "rows")))
    said = ended(
        start(tmp_path / "run", "--mesh.data", "2", "--mesh.fsdp", "4", config=str(config)), 2
    )
    assert "train.py: process 1: Cannot open the data file" in said[0]
    assert "train.py: Cannot open the data file" in said[1]
    (tmp_path / "rows1.json").write_text((tmp_path / "rows.json").read_text() + " ")
    (tmp_path / "rows.json").rename(tmp_path / "rows0.json")
    config.write_text(OF_OTHER_FILES.format(path=str(tmp_path / "rows")).replace("''", "'0'"))
    said = ended(
        start(tmp_path / "other", "--mesh.data", "2", "--mesh.fsdp", "4", config=str(config)), 2
    )
    assert all("process 1 has other data files than process 0" in text for text in said)


# Each process has a data file of its own, as if on its own disk; the name differs here as well.
OF_OTHER_FILES = """
import dataclasses, os
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from tests.training import one_stage

def config():
    own = os.environ["JAX_PROCESS_ID"].replace("0", '')
    data = SourcesConfig(
        datasets=(Dataset(path="{path}" + own + ".json"),), video=FrameSampling(fps=1)
    )
    return dataclasses.replace(one_stage.config(), data=data)
"""


@pytest.mark.parametrize("end", ["SIGTERM", "the limit"])
def test_a_wait_for_a_process_that_does_not_come_has_an_end(tmp_path, end):
    """The other one lives, and never says what it has to say."""
    processes = start(tmp_path, end, command=[sys.executable, "-c", WAITING])
    assert processes[0].stdout is not None
    if end == "SIGTERM":
        lines = iter(processes[0].stdout.readline, "")
        assert any("waits for the other processes" in line for line in lines)
        processes[0].send_signal(signal.SIGTERM)
    said = processes[0].communicate(timeout=100)[0]
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == {"SIGTERM": 143, "the limit": 1}[end], said
    told = {"SIGTERM": "stopped by SIGTERM after ", "the limit": "has waited "}[end]
    assert told in said and "the same command continues from the last checkpoint" in said


WAITING = """
import os, signal, sys, time
from llava_mini_jax import distributed, signals

def wait():
    distributed.start()
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a training run has
    distributed.wait_for_all()
    if os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(1000)
    distributed.TOLD_AFTER, distributed.GRACE = 1.0, 1.0
    distributed.LONGEST = 5.0 if sys.argv[2] == "the limit" else 1000.0
    distributed.wait_for_all()

signals.run(wait, "stopped")
"""


# The first process is slow to move what is damaged.
RESUMED = """
import sys, time
from pathlib import Path
import jax, numpy as np
from llava_mini_jax import distributed, sharding
from llava_mini_jax.training import checkpoint
from llava_mini_jax.training.checkpoint import Checkpoints

folder, event = Path(sys.argv[1]), sys.argv[2]
distributed.start()

def state(value):
    return {"a": sharding.put_batch(np.full((4, 8), value, np.float32))}

def slowly(*given, **options):
    time.sleep(1)
    print(*given, **options)

def fail_on_2(handler, directory, args):
    if directory.name == "2":
        raise OSError("stale file handle")
    return restore(handler, directory, args)

with jax.set_mesh(sharding.make_mesh(data=8)):
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
    distributed.wait_for_all()
    if event == "damaged" and distributed.is_first():
        checkpoint.print = slowly
        for file in (folder / "2" / "state").glob("**/d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    distributed.wait_for_all()
    with Checkpoints(folder, keep=3) as checkpoints:
        handler = checkpoints._ocp.CompositeCheckpointHandler
        restore = handler.restore
        if event != "damaged" and not distributed.is_first():
            handler.restore = fail_on_2
        step, found, _ = checkpoints.resume(state(0))
        value = float(distributed.fetch(found["a"])[0, 0])
        print("resumed from", step, "with", f"{value}, there are", checkpoints._manager.all_steps())
        checkpoints.save(2, state(2.5), {})
        checkpoints._manager.wait_until_finished()
        print("saved", sorted(checkpoints._manager.all_steps()))
distributed.stop()
"""


def text_only(item):
    turns = [dict(turn) for turn in item["conversations"]]
    turns[0]["value"] = turns[0]["value"].replace("<image>\n", "")
    return {"id": item["id"], "conversations": turns}


OF_FILES = """
import dataclasses
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from tests.training import one_stage

def config():
    data = SourcesConfig(datasets=(Dataset(path={path!r}),), video=FrameSampling(fps=1))
    return dataclasses.replace(
        one_stage.config(), data=data, bad_samples=1.0, steps=5000, checkpoint_every=5000
    )
"""
