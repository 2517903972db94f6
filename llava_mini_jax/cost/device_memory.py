"""What a device holds: some arrays all the time, and beside them those of one phase after another.

always | the phase that takes most --> terms at the peak --> total
"""

import dataclasses
import math

import jax

from llava_mini_jax.params import Tree

FLOAT32 = 4  # bytes of a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by name. Of `phases` one is there at a time."""

    always: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total_in)

    @property
    def terms(self) -> dict[str, int]:
        """What is there at the peak."""
        return self.always | self.phases[self.peak]

    @property
    def total(self) -> int:
        return self.total_in(self.peak)

    def total_in(self, phase: str) -> int:
        return sum(self.always.values()) + sum(self.phases[phase].values())


def tree_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays, of abstract ones too."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
