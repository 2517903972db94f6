"""`llava-mini serve` as a process of its own, and what it takes of the machine.

MODEL --served--> Served: a client, and figures of /proc and /metrics before and after
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests import tiny_model
from tests.conftest import ROOT
from tests.serving.running import Client, wait_until

READY_SECONDS = 600.0
ENV = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Taken:
    """What a server takes at a moment in which nobody asks."""

    slots: int
    running: int
    waiting: int
    threads: int
    files: int  # descriptors
    resident: int  # bytes
    compilations: int


class Served:
    def __init__(self, process: subprocess.Popen, client: Client, errors: Path):
        self.process, self.client, self._errors = process, client, errors

    @property
    def stderr(self) -> str:
        return self._errors.read_text(errors="replace")

    def figure(self, name: str) -> float:
        """The sum over all series of a metric."""
        text = self.client.send("/metrics").body.decode()
        found = re.findall(rf"^llava_mini:{name}(?:{{.*}})? (\S+)$", text, re.M)
        if not found:
            raise ValueError(f"/metrics has no llava_mini:{name}")
        return sum(map(float, found))

    def idle(self, seconds: float = 60.0) -> None:
        """Waits until nobody is being answered."""
        names = ("slots_in_use", "num_requests_running", "num_requests_waiting")
        wait_until(lambda: not any(map(self.figure, names)), seconds)

    def taken(self) -> Taken:
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Taken(
            slots=int(self.figure("slots_in_use")),
            running=int(self.figure("num_requests_running")),
            waiting=int(self.figure("num_requests_waiting")),
            threads=int(status["Threads"]),
            files=len(list((proc / "fd").iterdir())),
            resident=int(status["VmRSS"].split()[0]) * 1024,
            compilations=int(self.figure("compilations_total")),
        )

    def greedy(self) -> str:
        """An answer that must never change."""
        return self.client.said("What is this?", max_tokens=24, ignore_eos=True)


@contextlib.contextmanager
def served(model: str, *options: str) -> Iterator[Served]:
    """A server that is ready; it must end with status 0 when it is told to."""
    with tempfile.TemporaryDirectory(prefix="load-") as place:
        errors = Path(place) / "stderr"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "llava_mini_jax", "serve", model, "--port", "0", *options],
                cwd=ROOT,
                env=os.environ | ENV,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            yield _ready(process, errors)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(90)
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen, errors: Path) -> Served:
    port, end = 0, time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        said = re.search(r"listening on http://\S+:(\d+)", errors.read_text(errors="replace"))
        port = int(said[1]) if said else 0
        with contextlib.suppress(OSError):
            if port and Client(port).send("/ready").status == 200:
                return Served(process, Client(port), errors)
        time.sleep(0.05)
    fail(f"the server is not ready: {errors.read_text(errors='replace')[-2000:]}")


def model_folder(name: str) -> str:
    """The folder of MODEL; `tiny` and `tiny:POSITIONS` are made, with random weights."""
    kind, _, positions = name.partition(":")
    return str(tiny_model.folder("paper", int(positions or 256))) if kind == "tiny" else name


def fail(sentence: str) -> NoReturn:
    """Ends the command with status 1."""
    sys.exit(f"not kept: {sentence}")


def check(kept: bool, sentence: str) -> None:
    if not kept:
        fail(sentence)
