"""Broken samples of a run: each is written down once, and too many of them end the run.

    Batch.rejected of all processes --Quarantine.add(step)--> workdir/quarantine.jsonl
                                            |
                    more than budget * total of a stage --> InputError with the list

Every process counts, one writes. A line is {"stage", "step", "id", "dataset", "reason"}. What an
interrupted run wrote after the checkpoint that it is continued from is forgotten and found again,
so the finished file is that of an uninterrupted run.
"""

from collections.abc import Iterable
from typing import Any

from etils import epath

from llava_mini_jax.data.batches.pipeline import Rejected
from llava_mini_jax.errors import InputError
from llava_mini_jax.journal import Journal

_SHOWN = 3  # samples in the error; the file has them all


class Quarantine:
    """The rejected samples of a stage; `add` takes those of all processes, on every process.

    total: samples of the stage's data. budget: the share of them that may be broken, 0.001 for
    0.1 %. Raises InputError when it is exceeded, also at once by what the file already holds, and
    for a file that is no quarantine. Nothing is written as long as all samples are good.
    """

    def __init__(
        self,
        path: epath.Path,
        stage: str,
        total: int,
        budget: float,
        first_step: int,
        *,
        write: bool = True,
    ):
        self._path, self._stage = path, stage
        self._total, self._budget = total, budget

        def keep(line: dict[str, Any]) -> bool:
            _check_line(line, path)
            return line["stage"] != stage or line["step"] <= first_step

        self._journal = Journal(path, keep, write=write)
        own = (line for line in self._journal.lines if line["stage"] == stage)
        self._reasons = {_key(line): str(line["reason"]) for line in own}
        self._check()

    def add(self, step: int, rejected: Iterable[Rejected]) -> None:
        """Takes note of the samples that a step met; `step` counts from 1, as in metrics.jsonl."""
        known = len(self)
        # Sorted, because the order in which processes are gathered depends on their number.
        for found in sorted(rejected, key=lambda r: (r.dataset, str(r.id))):
            line = {"stage": self._stage, "step": step, **found._asdict()}
            if _key(line) not in self._reasons:
                self._reasons[_key(line)] = found.reason
                self._journal.append(line)
        if len(self) > known:
            self._check()

    def __len__(self) -> int:
        """How many different samples of the stage are broken so far."""
        return len(self._reasons)

    def _check(self) -> None:
        if len(self) <= self._budget * self._total:
            return
        first = list(self._reasons.items())[:_SHOWN]
        shown = "; ".join(f"{name!r} ({reason.rstrip('.')})" for (_, name), reason in first)
        more = f" and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        raise InputError(
            f"{self._stage}: {len(self)} of {self._total} samples are broken, but bad_samples"
            f" allows {100 * self._budget:g} %: {shown}{more}. {self._path} lists them all: see"
            " `llava-mini data verify`, correct or remove them, or raise bad_samples."
        )


def _key(line: dict[str, Any]) -> tuple[str, str | int]:
    return line["dataset"], line["id"]


def _check_line(line: dict[str, Any], path: epath.Path) -> None:
    kinds = {"stage": str, "step": int, "id": str | int, "dataset": str, "reason": str}
    if line.keys() != kinds.keys() or not all(isinstance(line[k], t) for k, t in kinds.items()):
        raise InputError(
            f"{path} has the line {line!r:.80}, which is not a broken sample; move the file away."
        )
