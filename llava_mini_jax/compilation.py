"""Compiled programs, kept from run to run: JAX's persistent cache, as the three programs use it.

    --compilation-cache, or JAX_COMPILATION_CACHE_DIR, or the user's cache folder
        --keep_programs--> JAX reads and writes programs there, or one line why it does not

JAX's keys hold the program, its options, the versions of XLA and of the platform, and the devices;
of a CPU all its features. So machines may share a folder, and a program that is read is the one
that would have been compiled. As a library the package leaves JAX's configuration as it finds it.
"""

import contextlib
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax import environment
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.signals import say

OFF = "none"
HELP = f'folder for compiled programs, or "{OFF}" (default: the user\'s cache folder)'
MOST_BYTES = 8 * 10**9  # of programs in the user's cache folder; the longest unused ones go
_LEAST_SECONDS = 0.1  # programs that compile faster than this are not kept
# What JAX warns of, and goes on: the entry is damaged, or cannot be written (a full disk).
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.S
)


def keep_programs(given: str | None, program: str, *, processes: int = 1) -> None:
    """Before the first compilation. `given` is the option's value; None leaves the choice to us.

    A folder that cannot be written is told in a line, and the run goes on without. Several
    processes need a folder that all of them see, so without one that is named they have none.
    Raises InputError for what is no folder.
    """
    # Before the cache is asked for: a wrong value is refused where it is off, too.
    if given is not None and (not given or os.path.isfile(given)):
        raise InputError(
            f'--compilation-cache is {short(given)}, which is not a folder; give one, or "{OFF}"'
        )
    import jax

    _listen()
    named = given if given is not None else jax.config.values["jax_compilation_cache_dir"]
    if named == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    enabled = jax.config.values["jax_enable_compilation_cache"]
    if not enabled or (named is None and processes > 1):
        return
    folder = environment.cache_folder("programs") if named is None else named
    # Of several processes the first one writes.
    reason = _why_not(folder) if processes == 1 or jax.process_index() == 0 else None
    if reason is not None:
        say(f"{program}: compiled programs are not kept: {folder} {reason}; name another folder "
            f'by --compilation-cache, or "{OFF}"')  # fmt: skip
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if named is None:
        _drop_oldest(folder, MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    _mend(folder, program)


def threads_pay() -> bool:
    """Whether programs should be compiled by threads, beside other work: they need cores of their
    own. On two, with nothing but a CPU, they were no faster than the programs' first calls."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return jax.default_backend() != "cpu" or (cores or 1) >= 4


class _Counts(NamedTuple):
    asked: int = 0  # programs that were needed
    read: int = 0  # of these, found in the folder
    seconds: float = 0.0  # in all threads together


class _State:
    """Of this process, as JAX's cache is."""

    counts = _Counts()
    told = _Counts()  # by `news`
    listens = False


def _listen() -> None:
    import jax

    def one(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _State.counts = _State.counts._replace(read=_State.counts.read + 1)

    def took(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            asked, read, so_far = _State.counts
            _State.counts = _Counts(asked + 1, read, so_far + duration_secs)

    if not _State.listens:
        jax.monitoring.register_event_listener(one)
        jax.monitoring.register_event_duration_secs_listener(took)
        _State.listens = True


def compiled() -> int:
    """Programs that this process has needed so far, those read from the folder included."""
    _listen()
    return _State.counts.asked


def news() -> str:
    """What has been compiled since this was called last; "" for nothing."""
    now, before, _State.told = _State.counts, _State.told, _State.counts
    asked, read, seconds = (a - b for a, b in zip(now, before, strict=True))
    if not asked:
        return ""
    return f"{asked} programs in {seconds:.1f} s: {asked - read} compiled, {read} read"


def _why_not(folder: str) -> str | None:
    """Why nothing can be kept in `folder`, which is made if it is not there."""
    if "://" in folder:  # a bucket: JAX asks it, and tells what is wrong
        return None
    if folder.startswith("~"):
        return "is in no known home"
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def _drop_oldest(folder: str, most: int) -> None:
    """Removes the programs that nobody has used for longest, until `most` bytes are left."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process removes them too
            stat = entry.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= most:
            return
        with contextlib.suppress(OSError):  # a folder of XLA's own, for one
            os.unlink(path)
            left -= size


def _mend(folder: str, program: str) -> None:
    """Entries that JAX cannot read, or not write whole, are removed, and told in a line once.

    JAX alone would warn of a damaged one in every run, and never write over it.
    """
    shown, told = warnings.showwarning, set()
    warnings.filterwarnings("always", _TROUBLE.pattern)

    def show(message: Warning | str, *more: Any, **named: Any) -> None:
        trouble = _TROUBLE.match(str(message))
        if trouble is None:
            return shown(message, *more, **named)
        doing, name, reason = trouble.groups()
        for entry in Path(folder).glob(f"{name}-*-cache"):
            with contextlib.suppress(OSError):
                entry.unlink()
        if doing not in told:
            told.add(doing)
            say(f"{program}: {doing} compiled programs in {folder} failed ({name}: "
                f"{' '.join(reason.split()):.200}); the run continues")  # fmt: skip

    warnings.showwarning = show
