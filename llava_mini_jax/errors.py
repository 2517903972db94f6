"""The exceptions for bad input and for data that is lost, what their sentences say of strangers'
values, and the one sentence for memory that is full."""

import errno
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """Bad input: a file, an argument or a config that cannot be used as it is.

    The message is one clear sentence (or a list of them) for the person who gave the input: the
    value, what was expected, where, and what to do. The command line prints it without a traceback
    and exits with status 2.
    """


class LostError(RuntimeError):
    """Data that was there when it was opened and can no longer be read: a bucket that does not
    answer, a file that somebody has changed.

    No fault of a sample, so none is set aside for it: the run ends, and may be tried again.
    """


def short(value: object, limit: int = 120) -> str:
    """`repr` of a value from a file that nobody vouches for, fit for a message.

    It stops early, and not after: values that hold each other make a `repr` that never ends.
    """
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = limit
    brief.maxlevel, brief.maxdict, brief.maxlist, brief.maxtuple = 3, 8, 8, 8
    try:
        text = brief.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."


# As XLA says it ("Out of memory allocating 30021779524 bytes", "while trying to allocate 1.5GiB"),
# numpy ("Unable to allocate 64.0 GiB"), and XLA for TPU ("Attempting to allocate 4.00G", and of a
# program as a whole "Used 20.51G of 15.75G hbm").
_FULL = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|std::bad_alloc|Unable to allocate", re.IGNORECASE
)
_NEEDED = re.compile(r"(?:allocat\w+|Used) ([\d.]+) ?([KMGTP]?)(i?B|bytes)?\b", re.IGNORECASE)


def memory_sentence(error: BaseException, advice: str) -> str | None:
    """What was needed, what there is, and `advice`, if memory was full; None for other errors.

    Looks at what caused `error` too. Sizes are decimal GB.
    """
    for cause in _causes(error):
        text = str(cause)
        refused = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
        told = isinstance(cause, RuntimeError | ValueError) and _FULL.search(text)
        if isinstance(cause, MemoryError) or refused or told:
            found = _NEEDED.search(text)
            needed = f"{_bytes(*found.groups()) / 1e9:,.2f} GB more are needed" if found else ""
            return f"memory is full: {needed or 'more is needed'}, {_there_is()}; {advice}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _bytes(number: str, prefix: str, unit: str | None) -> float:
    power = " KMGTP".index(prefix.upper() or " ")
    return float(number) * 1024**power


def _there_is() -> str:
    """The memory of the first accelerator, or of the machine where there is none."""
    jax = sys.modules.get("jax")
    stats = jax.local_devices()[0].memory_stats() if jax else None
    if stats and "bytes_limit" in stats:
        size, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
        return f"the device has {size / 1e9:.1f} GB, {(size - used) / 1e9:.1f} GB of it free"
    page = os.sysconf("SC_PAGE_SIZE")
    size, free = (page * os.sysconf(f"SC_{name}PHYS_PAGES") for name in ("", "AV"))
    meminfo = Path("/proc/meminfo")  # Linux: what can be freed for a program is free too
    if meminfo.exists() and (found := re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())):
        free = 1024 * int(found[1])
    return f"this machine has {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free"
