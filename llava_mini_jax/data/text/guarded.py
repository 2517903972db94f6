"""Chat templates and tokenizer files are other people's programs: a process of their own runs them.

    request --a line of JSON--> guarded_child.py, with limits of memory and processor time
       ^                                  |
       '---- the result, or Refused with a reason: an error, too much of either, its end

A template can loop for hours or write gigabytes, a damaged tokenizer.json can make its library
allocate until the process is ended. Here the process that ends is the child, and the next request
starts another one.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("guarded_child.py")
_PATIENCE = 20  # times its processor time: a request may have to wait for a busy machine

# One thread: on machines of many cores, threads' stacks and heaps alone would pass the limit.
_ALONE = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
}


class Refused(Exception):  # noqa: N818
    """Why a request got no result, as part of a sentence."""

    def __init__(self, reason: str, *, limit: bool = False):
        super().__init__((reason.strip() or "unknown").splitlines()[0][:300].rstrip("."))
        self.limit = limit  # of memory, time or text: asking in another way will not help


class Guarded:
    """A child process that is started by the first request; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # a forked process has a child of its own

    def do(self, work: str, given: dict[str, Any], *, seconds: float, megabytes: int) -> Any:
        """The result of a function of guarded_child.WORK; raises Refused if there is none."""
        request = {"work": work, "given": given, "seconds": seconds, "megabytes": megabytes}
        with self._lock:
            try:
                process = self._started()
            except OSError as error:
                raise Refused(f"no process can be started for it: {error}") from error
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(_PATIENCE * seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            except BaseException:  # an interrupt: the answer would be taken for the next request's
                self._end()
                raise
            finally:
                timer.cancel()
            if not line.endswith("\n"):
                raise Refused(_end_of(self._end(), seconds, megabytes), limit=True)
            reply = json.loads(line)
            if "limit" in reply:
                self._end()  # it keeps what it took
                raise Refused(reply["limit"], limit=True)
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["ok"]

    def close(self) -> None:
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._end()

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            # -P: modules beside the script must not stand for those of the standard library.
            # Its own session: Ctrl-C is for those who know what to do with it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,
                env={**os.environ, **_ALONE},
            )
        return self._process

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        return process.wait()


def _end_of(status: int, seconds: float, megabytes: int) -> str:
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return f"it takes more than {seconds:g} s"
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"it ends the process that reads it ({name}), which may use {megabytes} MB of memory"


GUARDED = Guarded()  # of all chat templates
atexit.register(GUARDED.close)
