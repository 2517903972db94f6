"""Metrics of a run: workdir/metrics.jsonl, TensorBoard and other trackers, and a progress bar or
lines on stderr.

    a step's values on the device, what the host counted --add--> .. --log, every few steps--> lines
    {"stage": "stage2", "step": 10, "loss": 1.3, ...}    workdir/metrics.jsonl
    training/loss, heldout/loss, ...                     workdir/tensorboard/STAGE/, trackers

Values stay on the device until they are logged, a few steps later, so that the loop never waits
for them. Every process computes them, the first one writes.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.cost.chips import peak_flops
from llava_mini_jax.journal import Journal
from llava_mini_jax.terminal import curve
from llava_mini_jax.training.tensorboard import Board


class Counted(NamedTuple):
    """What the host knows about a step, of all processes together."""

    examples: int
    positions: int  # of the language model: text and vision tokens, no padding
    images: int  # or frames
    flops: float  # of the model (cost/flops.py)
    waited: float  # seconds for data, of this process


class Tracks(Protocol):
    """What keeps values by step: TensorBoard's `Board`, or one of trackers.py."""

    def add(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Use as a context manager: it holds a file open and shows a progress bar.

    Where stderr is no terminal, as on a cluster, every `log` is a line there instead. `trackers`
    are those of the first process; it closes them.
    """

    def __init__(
        self,
        workdir: epath.Path,
        stage: str,
        steps: int,
        first_step: int,
        trackers: Sequence[Tracks] = (),
    ):
        from rich.console import Console

        def is_before(line: dict[str, Any]) -> bool:
            # Steps behind the checkpoint are taken again, and would stand there twice.
            return line["stage"] != stage or line["step"] <= first_step

        first = distributed.is_first()
        self._journal = Journal(workdir / "metrics.jsonl", is_before, write=first)
        board = [Board(workdir / "tensorboard" / stage, first_step)] if first else []
        self._boards: list[Tracks] = [*board, *trackers]
        self._stage = stage
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self._values: list[Mapping[str, Any]] = []
        self._counted: list[Counted] = []
        self._since = time.perf_counter()
        console = Console(stderr=True)
        self._lines_or_bar = first
        self._lines = first and not console.is_terminal
        self._steps = steps
        self._progress = _bar(console, shown=first and not self._lines)
        self._task = self._progress.add_task(
            stage, total=steps, completed=first_step, about="compiling"
        )

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for board in self._boards:
            board.close()

    def add(self, values: Mapping[str, Any], counted: Counted) -> None:
        """Takes note of a step; its values are not read yet."""
        self._values.append(values)
        self._counted.append(counted)
        self._progress.advance(self._task)

    def log(self, step: int, rates: Mapping[str, float]) -> dict[str, float]:
        """What the steps since the last call came to, written down as of `step`.

        `rates` are the learning rates, by name. Skipped steps (step.py) have no loss: they are
        counted, and the means are those of the others (where there is none NaN, in the file null).
        So are steps with nothing supervised (`unsupervised`), whose loss and gradient mean nothing.
        `skipped_in_a_row` is the longest run of them that the steps since the last call belong to.
        """
        seconds = time.perf_counter() - self._since
        values = {**_learnt(self._values), **rates, **_speed(self._counted, seconds, self._peak)}
        self._write(step, "training", values)
        about = f"{_told(values)}  {values['examples_per_second']:.0f} examples/s"
        self._progress.update(self._task, about=about)
        if self._lines:
            seconds_a_step = f"{values['step_seconds']:.3g} s a step"
            line = f"{self._stage}  step {step} of {self._steps}  {about}  {seconds_a_step}"
            print(line, file=sys.stderr, flush=True)
        self._values, self._counted, self._since = [], [], time.perf_counter()
        return values

    def log_heldout(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what an evaluation after `step` came to; its time counts for no step.

        Where nothing in it was supervised (values that are NaN), stderr has a line.
        """
        if self._lines_or_bar and not math.isfinite(values.get("loss", 0.0)):
            about = "the held-out data has no figure: nothing supervised, or no finite loss"
            self._progress.console.print(f"{self._stage}  step {step}  {about}", soft_wrap=True)
        self._write(step, "heldout", {f"heldout_{name}": v for name, v in values.items()})
        self._since = time.perf_counter()

    def show_curve(self) -> None:
        """Draws the loss of all steps of the stage on stderr, those of earlier runs too."""
        lines = [line for line in self._journal.lines if line["stage"] == self._stage]
        points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if self._lines_or_bar and (drawn := curve(points)):
            print(f"{self._stage}: loss", *drawn, sep="\n", file=sys.stderr)

    def _write(self, step: int, group: str, values: Mapping[str, float]) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._journal.append({"stage": self._stage, "step": step, **finite})
        named = {f"{group}/{name.removeprefix('heldout_')}": v for name, v in finite.items()}
        for board in self._boards:
            board.add({name: v for name, v in named.items() if v is not None}, step)


def _bar(console: Any, *, shown: bool) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[about]}"),
        console=console,
        disable=not shown,
    )


def _learnt(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    not_skipped = [m for m in steps if not m["skipped"]]
    taken = [m for m in not_skipped if float(m["tokens"])]
    tokens = sum(float(m["tokens"]) for m in taken)

    def by_token(name: str) -> float:
        return _ratio(sum(float(m[name]) * float(m["tokens"]) for m in taken), tokens)

    values = {
        "loss": by_token("loss"),
        "token_accuracy": _ratio(sum(float(m["right_tokens"]) for m in taken), tokens),
        "grad_norm": _ratio(sum(float(m["grad_norm"]) for m in taken), len(taken)),
        "supervised_tokens": tokens,
        "unsupervised": len(not_skipped) - len(taken),
        "skipped": len(steps) - len(not_skipped),
        "skipped_in_a_row": max(int(m["skipped_in_a_row"]) for m in steps),
    }
    if "z_loss" in steps[0]:
        values["z_loss"] = by_token("z_loss")
    return values | at_counts(steps, taken)


def at_counts(
    steps: Sequence[Mapping[str, Any]], taken: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """rows_at_n of all steps, and loss_at_n of those `taken`: of rows with n vision tokens alone
    (loss.py); nothing where rows do not choose them."""

    def total(name: str, of: Sequence[Mapping[str, Any]]) -> float:
        return sum(float(m[name]) for m in of)

    values = {}
    for name in steps[0]:
        if name.startswith("rows_at_"):
            n = name.removeprefix("rows_at_")
            tokens = total(f"tokens_at_{n}", taken)
            values[name] = total(name, steps)
            values[f"loss_at_{n}"] = _ratio(total(f"cross_entropy_at_{n}", taken), tokens)
    return values


def _told(values: Mapping[str, float]) -> str:
    """The loss, or why there is none, and what it leaves out."""
    without = {
        "nothing supervised": int(values["unsupervised"]),
        "no finite loss or gradient": int(values["skipped"]),
    }
    why = ", ".join(f"{what} in {n} step{'s'[: n > 1]}" for what, n in without.items() if n)
    if not values["supervised_tokens"]:
        return f"no loss: {why}"
    return f"loss {values['loss']:.3f}" + (f" ({why})" if why else "")


def _speed(steps: Sequence[Counted], seconds: float, peak: float | None) -> dict[str, float]:
    values = {
        "step_seconds": seconds / len(steps),
        "data_wait_seconds": sum(s.waited for s in steps) / len(steps),
        "examples_per_second": sum(s.examples for s in steps) / seconds,
        "tokens_per_second": sum(s.positions for s in steps) / seconds,
        "images_per_second": sum(s.images for s in steps) / seconds,
        "model_tflops_per_second": sum(s.flops for s in steps) / seconds / 1e12,
    }
    if peak is not None:
        values["model_flop_utilisation"] = sum(s.flops for s in steps) / seconds / peak
    return values


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
