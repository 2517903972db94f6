"""Metrics of a run: one JSON object a line in workdir/metrics.jsonl, and a progress bar.

Values stay on the device until they are logged, a few steps later, so that the loop never waits
for them.
"""

import json
import math
import time
from typing import Any

from etils import epath


class Metrics:
    def __init__(self, workdir: epath.Path, stage: str, steps: int, first_step: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        path = workdir / "metrics.jsonl"
        _forget_later_steps(path, stage, first_step)
        self._file = path.open("a")
        self._stage = stage
        self._waiting: list[dict[str, Any]] = []
        self._examples = 0
        self._since = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[about]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(stage, total=steps, completed=first_step, about="")

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()

    def add(self, metrics: dict[str, Any], examples: int) -> None:
        """Takes note of a step; its values are not read yet."""
        self._waiting.append(metrics)
        self._examples += examples
        self._progress.advance(self._task)

    def log(self, step: int) -> dict[str, float]:
        """Means since the last call, written down as of `step`.

        Skipped steps (step.py) have no loss: they are counted, and the means are those of the
        others (where there is none NaN, in the file null). `skipped_in_a_row` is the longest run
        of them that the steps since the last call belong to.
        """
        taken = [m for m in self._waiting if not m["skipped"]]
        tokens = sum(float(m["tokens"]) for m in taken)

        def by_token(name: str) -> float:
            return _ratio(sum(float(m[name]) * float(m["tokens"]) for m in taken), tokens)

        values = {
            "loss": by_token("loss"),
            "token_accuracy": _ratio(sum(float(m["right_tokens"]) for m in taken), tokens),
            "grad_norm": _ratio(sum(float(m["grad_norm"]) for m in taken), len(taken)),
            "skipped": len(self._waiting) - len(taken),
            "skipped_in_a_row": max(int(m["skipped_in_a_row"]) for m in self._waiting),
        }
        if "z_loss" in self._waiting[0]:
            values["z_loss"] = by_token("z_loss")
        seconds = time.perf_counter() - self._since
        values["step_seconds"] = seconds / len(self._waiting)
        values["examples_per_second"] = self._examples / seconds
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"stage": self._stage, "step": step, **written}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        about = f"loss {values['loss']:.3f}  {values['examples_per_second']:.0f} examples/s"
        self._progress.update(self._task, about=about)
        self._waiting, self._examples, self._since = [], 0, time.perf_counter()
        return values


def _forget_later_steps(path: epath.Path, stage: str, first_step: int) -> None:
    """Removes what an interrupted run wrote after the checkpoint that it is continued from."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the process ended in the middle of this line
            continue
        if line["stage"] != stage or line["step"] <= first_step:
            kept.append(text + "\n")
    path.write_text("".join(kept))


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
