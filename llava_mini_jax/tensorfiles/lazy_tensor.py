"""One tensor that still lies on disk, whatever kind of file holds it.

    file:  | header ... |  offset -> [ element, element, ... ]  | other tensors ... |
                                          |
                shape, dtype, strides say which bytes are which element
                                          |
                   read(index) -> numpy array with memory of its own

Both readers of weight files (`safetensors_header`, `torch_pickle`) end in these records, after they
have checked that every element lies inside the file. Nothing is read before `read`.
"""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_mini_jax.errors import InputError, short

MAX_RANK = 64  # numpy's own limit on the number of axes
MAX_ADDRESSABLE_BYTES = 2**62  # numpy refuses arrays whose axes multiply to more, even empty ones


@dataclass(frozen=True)
class LazyTensor:
    """One tensor on disk; nothing is read until `read`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype  # ml_dtypes' types for bfloat16 and float8
    file: Path
    offset: int  # of the first element, in bytes from the start of the file
    strides: tuple[int, ...]  # bytes from one element to the next, one number for each axis

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self,
        index: tuple[slice, ...] = (),
        empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> np.ndarray:
        """The tensor, or the part that `index` cuts out of it, as a C-contiguous array.

        `index` has at most one slice for each axis, as `jax.make_array_from_callback` gives them;
        the axes that it leaves out are taken whole. Only the pages of the file that hold the part
        are read, and the array keeps neither the file nor a map of it open.

        `empty` makes the array that is filled; one of another dtype gets the numbers converted, on
        the way from the file.

        Raises InputError where the file has gone or shrunk since it was opened.
        """
        if len(index) > len(self.shape) or not all(isinstance(part, slice) for part in index):
            raise TypeError(f"{self.name} has shape {self.shape}, it cannot be cut by {index}.")
        if 0 in self.shape:  # an empty file part cannot be mapped
            return empty(np.empty(self.shape)[(*index, ...)].shape, self.dtype)
        try:
            file_bytes = np.memmap(self.file, np.uint8, mode="r")
            view = np.ndarray(self.shape, self.dtype, file_bytes, self.offset, self.strides)
        except (OSError, ValueError, TypeError) as error:
            if getattr(error, "errno", None) == errno.ENOMEM:
                raise  # which says nothing about the file
            raise InputError(
                f"{self.file} no longer holds tensor {self.name!r}, expected from byte "
                f"{self.offset:,} on ({error}); the file was changed or removed after it was "
                "opened, so open it again once it is complete."
            ) from error
        part = view[(*index, ...)]  # with ..., so that a scalar is an array too
        array = empty(part.shape, self.dtype)
        array[...] = part
        return array


def shape_problem(shape: object, itemsize: int) -> str | None:
    """What is wrong with a shape that a file states, in words; None where numpy can hold it."""
    if not isinstance(shape, (list, tuple)):
        return "its shape is not a list"
    if len(shape) > MAX_RANK:
        return f"it has {len(shape)} axes, more than the {MAX_RANK} that numpy can hold"
    if not all(type(size) is int and size >= 0 for size in shape):
        return f"its shape {short(shape)} is not made of whole numbers from 0 on"
    if math.prod(max(size, 1) for size in shape) * itemsize > MAX_ADDRESSABLE_BYTES:
        return f"its shape {short(shape)} is larger than any memory"
    return None


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a row-major tensor: (2, 3) of 4-byte elements gives (12, 4)."""
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))
