"""What is printed: for people sizes in words, columns, and if they watch, progress on stderr.

for people --columns, human_bytes, curve--> lines;  note, waiting, bars --> stderr, at a terminal
for programs (--json) --print_json--> stdout: one document, and nothing else
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

GIB = 2**30


def note(text: str) -> None:
    """A line on stderr if it is a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def print_json(document: Any) -> None:
    """The one document that --json leaves on stdout."""
    print(as_json(document, indent=2))


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as other languages read it, too, in which NaN is null."""
    return json.dumps(finite(value), indent=indent, default=str, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None for all numbers in it that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def human_bytes(count: float, unit: str = "") -> str:
    """16.1 GB, in the decimal unit that fits; or all in the same one: 16.123 GB, or 15.02 GiB."""
    if unit:
        return f"{count / 1e9:,.3f} GB" if unit == "GB" else f"{count / GIB:,.2f} GiB"
    for word in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {word}" if word == "B" else f"{count:.1f} {word}"
        count /= 1000
    return f"{count:.1f} TB"


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with cells of equal width: the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(n) for cell, n in zip(row[:left], widths[:left], strict=True)]
        cells += [cell.rjust(n) for cell, n in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner while something without steps goes on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class TensorBar:
    """A bar over tensors and bytes; it appears with `expect`."""

    def __init__(self, progress: "Progress"):
        self._progress = progress
        self.tensors = self.nbytes = self._done = 0

    def expect(self, tensors: int, nbytes: int) -> None:
        self.tensors, self.nbytes = tensors, nbytes
        self._task = self._progress.add_task("", total=nbytes, done=0, tensors=tensors)

    def step(self, nbytes: int) -> None:
        """One more tensor is through."""
        self._done += 1
        self._progress.update(self._task, advance=nbytes, done=self._done)


@contextlib.contextmanager
def counting(
    what: str, total: int | None = None, *, stays: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar over items on stderr if it is a terminal, with the time left; `stays`: behind its end.

    What it gives is called with rich's words: advance=1, or completed=n and total=m.
    """
    from rich import progress as bars

    with _bars(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        transient=not stays,
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda **change: progress.update(task, **change)


@contextlib.contextmanager
def watching(what: str, *, stays: bool = True) -> Iterator[Callable[[int, int], None]]:
    """`counting` for who says (how many are done, of how many)."""
    with counting(what, stays=stays) as bar:
        yield lambda done, total: bar(completed=done, total=total)


@contextlib.contextmanager
def loading(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes, called with (how many are read, of how many); it goes with its end."""
    from rich import progress as bars

    with _bars(
        bars.TextColumn("loading {task.description}"), *_byte_columns(), transient=True
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def tensor_progress() -> Iterator[TensorBar]:
    """A TensorBar on stderr if it is a terminal, else one that nobody sees."""
    from rich import progress as bars

    counts = bars.TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors")
    with _bars(counts, *_byte_columns()) as progress:
        yield TensorBar(progress)


def _byte_columns() -> "Sequence[ProgressColumn]":
    from rich import progress as bars

    speed, left = bars.TransferSpeedColumn(), bars.TimeRemainingColumn()
    return (bars.BarColumn(), bars.DownloadColumn(), speed, left)


def _bars(*columns: "ProgressColumn", transient: bool = False) -> "Progress":
    """Bars on stderr, which nobody sees if that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=transient)


# --- Numbers as a chart ---------------------------------------------------------------------------

_EIGHTHS = " ▁▂▃▄▅▆▇█"  # of a character's height


def curve(points: Sequence[tuple[int, float]], *, width: int = 64, height: int = 6) -> list[str]:
    """Values over steps as `height` lines and one of steps; [] for fewer than two.

    A column is the mean of its span of steps, the lowest one an eighth of a line high.
    """
    if len(points) < 2:
        return []
    first, last = points[0][0], points[-1][0]
    count = min(width, len(points))
    held: list[list[float]] = [[] for _ in range(count)]
    for step, value in points:
        held[(step - first) * count // (last - first + 1)].append(value)
    # A span without a step, of a run that logged seldom, is as the one before it.
    means: list[float] = []
    for values in held:
        means.append(sum(values) / len(values) if values else means[-1])
    low, high = min(means), max(means)
    scale = (8 * height - 1) / (high - low) if high > low else 0.0
    levels = [1 + round(scale * (mean - low)) for mean in means]
    ends = [f"{value:.3g}" for value in (high, low)]
    names = [ends[0], *[""] * (height - 2), ends[1]]
    edge, rows = max(map(len, ends)), reversed(range(height))
    lines = [
        f"{name:>{edge}} │" + "".join(_EIGHTHS[min(8, max(0, level - 8 * row))] for level in levels)
        for name, row in zip(names, rows, strict=True)
    ]
    steps = f"{first:<{max(len(str(first)) + 1, count - len(str(last)))}}{last}"
    return [*lines, f"{'':>{edge}} └{'─' * count}", f"{'':>{edge}}  {steps}"]
