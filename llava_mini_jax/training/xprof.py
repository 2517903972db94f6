"""A window of steps recorded for xprof: `train.py ... --profile.steps 10:15`.

workdir/profile/STAGE/plugins/profile/DATE/    open with: xprof --logdir workdir/profile/STAGE
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from llava_mini_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps to record for xprof. Raises InputError for an invalid range."""

    steps: str = ""  # "10:15" records steps 10 to 15 of every stage; "": none

    def __post_init__(self) -> None:
        if self.steps and self.window() is None:
            raise InputError(
                f'profile.steps is "{self.steps}"; expected the first and the last step, such as '
                '"10:15"'
            )

    def window(self) -> range | None:
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.steps)
        first, last = map(int, found.groups()) if found else (0, 0)
        return range(first, last + 1) if 1 <= first <= last else None


class Profiler:
    """Records the window of one stage; use as a context manager, which ends a begun recording."""

    def __init__(self, cfg: ProfileConfig, folder: epath.Path):
        self._window = cfg.window() or range(0)
        self._folder = folder
        self._recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording:
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[list[Any]]:
        """Around a step, which puts its results into the list: the last one is waited for."""
        results: list[Any] = []
        # Not only at the first one: a continued run may begin inside of the window.
        if number in self._window and not self._recording:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield results
        if self._recording and number == self._window[-1]:
            # Steps are dispatched ahead: without this the trace ends before the last one has run.
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._recording = False
