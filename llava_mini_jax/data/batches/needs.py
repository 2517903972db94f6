"""What each sample of a packed run takes of a row, known before any row is made.

samples --threads: text alone is encoded, nothing is decoded--> Needs (sets/packing.py)

Each process counts its share, and tells the others.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_mini_jax.data.batches.examples import BatchLayout, Example
from llava_mini_jax.data.batches.packed import row_needs
from llava_mini_jax.data.batches.pipeline import Source
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.data.sets.packing import Needs
from llava_mini_jax.errors import InputError

_PIECE = 256  # samples that a thread counts at a time


def needs_of(
    source: Source,
    text: Callable[[Sample], Example],
    layout: BatchLayout,
    numbers: range,
    threads: int = 0,
) -> Iterator[np.ndarray]:
    """int32 [n, 3] of the samples `numbers`, a piece at a time: the columns of Needs.

    `text` encodes a sample without its pixels (pipeline.py: Encoder.text). One that cannot be read
    needs nothing: whoever reads its row says why.
    """

    def of_one(number: int) -> tuple[int, int, int]:
        try:
            example = text(source[number])
        except InputError:
            return 0, 0, 0
        taken, images = row_needs(example, layout)
        return taken, images, int(example.fuse.sum()) if images else 0

    pieces = [numbers[start : start + _PIECE] for start in range(0, len(numbers), _PIECE)]
    with ThreadPoolExecutor(threads or max(1, (os.cpu_count() or 1) // 2), "needs") as pool:
        yield from pool.map(
            lambda piece: np.array([of_one(number) for number in piece], np.int32), pieces
        )


def as_needs(found: np.ndarray) -> Needs:
    """Of what `needs_of` gives, one piece behind the other."""
    return Needs(*found.T)
