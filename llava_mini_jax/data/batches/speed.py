"""How fast the data comes: a stream of batches taken as fast as it gives them.

stream(threads=n) --a few to warm up--> count batches --clock, CPU clock--> Speed
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llava_mini_jax.data.batches.pipeline import Batch
from llava_mini_jax.errors import InputError

_WARM_UP = 2


class Speed(NamedTuple):
    threads: int
    samples: float  # a second
    batches: float  # a second
    cpu: float  # seconds of one core that a sample takes


def measure(stream: Callable[..., Iterator[Batch]], threads: int, count: int) -> Speed:
    """The speed of `stream(threads=threads)` over `count` batches.

    A stream reads a few batches ahead, so `count` should be several times that. Raises InputError
    for numbers below 1. Broken samples are no fault here; they count.
    """
    if threads < 1 or count < 1:
        raise InputError(f"{threads} threads, {count} batches: each must be 1 or more.")
    batches = stream(threads=threads)
    for _ in range(_WARM_UP):
        next(batches)
    began, cpu = time.perf_counter(), time.process_time()
    samples = sum(len(next(batches).arrays.labels_BS) for _ in range(count))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Speed(threads, samples / seconds, count / seconds, cpu / samples)
