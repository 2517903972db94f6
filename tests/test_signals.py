"""Ctrl-C ends a program, whatever it is busy with; closed streams are no error."""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny_model
from tests.conftest import ROOT

LOST = {
    "a callback of the garbage collector": """
import gc
def callback(phase, info):
    if phase == "stop" and not done:
        done.append(1)
        signal.raise_signal(signal.SIGINT)
done = []
gc.callbacks.append(callback)
def program():
    gc.collect()
    return work()
""",
    "a finaliser": """
class Thing:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def program():
    thing = Thing()
    del thing
    return work()
""",
    "a callback of a weak reference": """
import weakref
class Thing:
    pass
def program():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    return work()
""",
    "nothing": """
def program():
    signal.raise_signal(signal.SIGINT)
    return work()
""",
    "code that catches everything": """
def program():
    try:
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)
    except BaseException:
        pass
    return 0
""",
}
BEGIN = """
import signal, sys, time
from llava_mini_jax import signals
def work():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        sum(range(1000))
    return 0
"""
END = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
signals.run(program, "it is stopped")
"""


def run(script, **options):
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


@pytest.mark.parametrize("where", LOST)
def test_an_interrupt_is_not_lost_in(where):
    began = time.monotonic()
    ended = run(BEGIN + LOST[where] + END)
    assert (ended.returncode, ended.stderr) == (130, "it is stopped\n"), ended.stderr
    assert time.monotonic() - began < 50  # the program's own end


BUSY = """
import os, sqlite3, threading
def program():
    def ask():
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=ask, daemon=True).start()
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n)"
    endless += " select count(*) from n"
    sqlite3.connect(":memory:").execute(endless).fetchone()
"""


def test_a_second_one_ends_a_program_that_is_inside_of_a_library():
    ended = run(BEGIN + BUSY + END)
    assert (ended.returncode, ended.stderr) == (130, "it is stopped\n"), ended.stderr


def test_one_is_enough_where_a_library_never_comes_back():
    script = BEGIN + BUSY.replace("range(2)", "range(1)") + "signals.GIVEN = 3.0\n" + END
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (130, "it is stopped\n"), ended.stderr


def test_a_job_in_the_background_goes_on_ignoring_it():
    script = BEGIN + LOST["nothing"].replace("work()", "7")
    ended = run(script + END.replace("default_int_handler", "SIG_IGN"))
    assert (ended.returncode, ended.stderr) == (7, "")


def test_statuses_and_what_was_printed():
    for end, status, told in (
        ("print('said'); return 3", 3, ""),
        ("print('said'); sys.exit(4)", 4, ""),
        ("print('said'); sys.exit('why')", 1, "why\n"),
        ("print('said'); sys.exit()", 0, ""),
        ("print('said'); raise ValueError('what')", 1, "ValueError: what\n"),
    ):
        ended = run(BEGIN + f"def program():\n    {end}\n" + END)
        assert (ended.returncode, ended.stdout) == (status, "said\n"), ended.stderr
        assert ended.stderr.endswith(told)


FRONT_DOORS = {
    "train.py": ["train.py", "configs/digits.py", "--dry-run"],
    "train.py --help": ["train.py", "--help"],
    "eval.py --help": ["eval.py", "--help"],
    "eval.py": ["eval.py", "--benchmarks", "mme", "--model", "x", "--data", "no/such/folder"],
    "llava-mini": ["-c", "from llava_mini_jax.cli import main; main()", "benchmarks"],
    "llava-mini --version": ["-c", "from llava_mini_jax.cli import main; main()", "--version"],
}


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("door", FRONT_DOORS)
def test_closed_streams(door, closed):
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, *FRONT_DOORS[door]]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == (2 if door == "eval.py" else 0), ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout and "Error" not in ended.stderr


def test_a_full_disk_behind_standard_output_is_told():
    command = ["bash", "-c", '"$@" > /dev/full', "bash", sys.executable, *FRONT_DOORS["llava-mini"]]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "No space left" in ended.stderr
    assert ended.stderr.count("\n") == 1


STARTED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["eval.py", "train.py"])
def test_ctrl_c_at_random_moments(program, tmp_path):
    draw = random.Random(program)
    for number in range(8):
        out = str(tmp_path / str(number))
        command = {
            "eval.py": ["--model", str(tiny_model.folder("paper")), "--limit", "300", "--out", out],
            "train.py": ["configs/digits.py", "--workdir", out],
        }[program]
        process = subprocess.Popen(
            [sys.executable, "-c", STARTED, program, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        time.sleep(draw.uniform(1, 9))
        over = process.poll() is not None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[0]
        assert process.returncode == (0 if over else 130), said
        assert "Traceback" not in said and (over or "stopped" in said), said
