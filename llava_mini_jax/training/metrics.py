"""Metrics of a run: one JSON object a line in workdir/metrics.jsonl, and a progress bar.

Values stay on the device until they are logged, a few steps later, so that the loop never waits
for them.
"""

import json
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

        self._file = (workdir / "metrics.jsonl").open("a")
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
        """Means since the last call, written down as of `step`."""
        tokens = sum(float(m["tokens"]) for m in self._waiting)
        loss = sum(float(m["loss"]) * float(m["tokens"]) for m in self._waiting)
        seconds = time.perf_counter() - self._since
        values = {
            "loss": loss / max(tokens, 1),
            "token_accuracy": sum(float(m["right_tokens"]) for m in self._waiting) / max(tokens, 1),
            "grad_norm": sum(float(m["grad_norm"]) for m in self._waiting) / len(self._waiting),
            "step_seconds": seconds / len(self._waiting),
            "examples_per_second": self._examples / seconds,
        }
        line = {"stage": self._stage, "step": step, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        about = f"loss {values['loss']:.3f}  {values['examples_per_second']:.0f} examples/s"
        self._progress.update(self._task, about=about)
        self._waiting, self._examples, self._since = [], 0, time.perf_counter()
        return values
