"""The most memory that this process has had."""

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_kilobytes() -> int:
    """Resident memory at its highest since the program began.

    Linux counts what getrusage tells from before exec too: a child of a large process would have
    that one's peak for its own.
    """
    if STATUS.exists():
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
