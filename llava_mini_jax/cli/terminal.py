"""What is for people who watch, not for files and pipes: notes and progress on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator


def note(text: str) -> None:
    """A line on stderr if it is a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def human_bytes(count: float) -> str:
    """Decimal units: 16.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner while something without steps goes on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def tensor_progress(tensors: int, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar over tensors and bytes; what it gives is called with the bytes of each tensor."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total_bytes, done=0, tensors=tensors)
        done = 0

        def step(nbytes: int) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=nbytes, done=done)

        yield step
