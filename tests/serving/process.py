"""`llava-mini serve` as a process, for tests that need all of it."""

import contextlib
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

PATIENCE = 240.0  # seconds: programs of all sizes are compiled, on a machine with other work


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """The url of a server that is ready. It must end well, and without a traceback."""
    server = subprocess.Popen(
        [sys.executable, "-m", "llava_mini_jax", "serve", str(folder), "--port", "0", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    told = ""
    try:
        for line in server.stderr:
            told += line
            if found := re.search(r"listening on (http://\S+)", line):
                _wait(found[1])
                yield found[1]
                break
    finally:
        server.terminate()
        told += server.stderr.read()
        assert server.wait() == 0 and "Traceback" not in told, told


def _wait(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready"):
            return
        time.sleep(0.2)
    raise AssertionError("the server has not become ready")
