"""A film of strangers, decoded where it can do no harm: the child of film.py.

    a line of JSON on stdin --read_video, within limits--> on stdout: {"frames": n}, a line, and,
                                    where frames are wanted, of each: 1 byte and its pixels
                                    {"error": "unreadable" | "large" | "memory"} where it fails

Beside the limits it is a process of low priority on few cores: who asks a film's questions must not
slow down the others' answers.
"""

import contextlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any, BinaryIO

from llava_mini_jax.data.media.image_file import TooLargeError
from llava_mini_jax.data.media.images import ImageConfig
from llava_mini_jax.data.media.video import FrameSampling, preprocess_frames, read_video

CORES = 4  # FFmpeg takes a thread, with its stack, for each core that it may run on
FRAME, FAILED = b"\x01", b"\x00"


def main() -> None:
    given = json.loads(sys.stdin.readline())
    out = _own_stdout()
    _be_small(given["megabytes"])
    try:
        _answer(given, out)
    except MemoryError:
        _fail(out, "memory")
    except TooLargeError:
        _fail(out, "large")
    except BrokenPipeError:  # nobody wants the rest
        pass
    except Exception:  # decoders raise almost anything on damaged files
        _fail(out, "unreadable")


def _answer(given: dict[str, Any], out: BinaryIO) -> None:
    seconds, cfg = given["seconds"], ImageConfig(**given["images"])
    _more_time(seconds)
    sampling = FrameSampling(**given["sampling"])
    frames = read_video(Path(given["path"]), sampling, max_pixels=given["pixels"])
    _tell(out, {"frames": len(frames)})
    if not given["wanted"]:
        return
    for frame in frames:
        pixels = preprocess_frames([frame], cfg, resize=given["resize"])[0]
        out.write(FRAME + pixels.tobytes())
        out.flush()
        _more_time(seconds)


def _tell(out: BinaryIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what).encode() + b"\n")
    out.flush()


def _fail(out: BinaryIO, reason: str) -> None:
    out.write(FAILED)
    _tell(out, {"error": reason})


def _own_stdout() -> BinaryIO:
    """The pipe; what a library prints goes nowhere. It holds a few frames where the system can."""
    out = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, 2**20)
    return out


def _be_small(megabytes: int) -> None:
    """Memory on top of what is taken now, priority and cores, as far as the system knows them."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.sample(cores, min(CORES, len(cores))))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _more_time(seconds: float) -> None:
    """So much processor time from now on; who takes more is ended by the system."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main()
