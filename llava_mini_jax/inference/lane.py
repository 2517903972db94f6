"""One lane on the host: its slots, who sits in them, and the settings of their rows.

LaneSize --Lane--> slots.py's arrays, a Slot for each row, Sampling of all rows
                     '--a program of it under way--> Call
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from llava_mini_jax.inference import slots
from llava_mini_jax.inference.sampling import Sampling, make_sampling
from llava_mini_jax.inference.work import Work


class LaneSize(NamedTuple):
    slots: int
    length: int  # positions of a slot


@dataclasses.dataclass
class Slot:
    work: Work | None = None
    marks: np.ndarray | None = None  # what it holds, once its request has left it
    name: Any = None  # for whom, and of which media
    left: int = 0  # when its request left it


class Call(NamedTuple):
    """A program under way."""

    told: slots.Told
    rows: list[tuple[int, Work]]  # (row of `told`, whose)
    lane: "Lane"
    decodes: bool


class Lane:
    def __init__(self, size: LaneSize, cfg: Any):
        self.size = size
        self.state: Any = slots.empty(size.slots, size.length, cfg)  # a slots.Lane
        self.slots = [Slot() for _ in range(size.slots)]
        self.sampling = make_sampling(size.slots, 0.0, 1.0, 0, 0, ())
        self.alive_B = np.zeros(size.slots, bool)
        self.told_B = np.zeros(size.slots, bool)
        self.decoding: dict[int, Work] = {}  # rows whose prompt is read

    def settings(self) -> tuple[Sampling, np.ndarray]:
        """For a program: copies, because arrays that it was given may still be read."""
        copied = {f.name: getattr(self.sampling, f.name).copy()
                  for f in dataclasses.fields(self.sampling)}  # fmt: skip
        return Sampling(**copied), self.told_B.copy()
