"""The recorded outputs of official code that tests compare with: `pytest --golden=DIR`.

A test that compares has no figure of its own: all are recorded in the folder or follow from it, so
any folder of this form will do. What tests of behaviour are made with is always ours (OWN).
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

OWN = Path(__file__).resolve().with_name("golden")
KINDS = ("eval", "preprocess", "prompts")
HELP = (
    "recorded outputs to compare with: a folder that has eval/, preprocess/ and prompts/ as"
    " tests/golden has, or some of them (others are taken from there), or whose own folders are"
    " those of eval/. Write --golden=DIR where no folder of tests is given."
)
_given = OWN


def use(given: Path) -> None:
    """Makes `given` the folder; to call before test files are imported."""
    global _given
    if not given.is_dir():
        raise NotADirectoryError(
            f"--golden {given} is not a folder; give one with {', '.join(KINDS)}"
        )
    _given = given.resolve()


def folder(kind: str) -> Path:
    """Where the files of this kind are."""
    if (_given / kind).is_dir():
        return _given / kind
    has_none = not any((_given / name).is_dir() for name in KINDS)
    return _given if kind == "eval" and has_none else OWN / kind


class Pixels(NamedTuple):
    """A recorded array of uint8 pixels; to keep files small, it may hold every n-th ones only."""

    array: np.ndarray
    every: int

    def seen(self, pixels: np.ndarray) -> np.ndarray:
        """What is recorded of pixels [..., Y, X]: all, or rows and columns 1, 1 + n, 1 + 2n, ..."""
        first = int(self.every > 1)
        return pixels[..., first :: self.every, first :: self.every]


def pixels(path: Path, name: str) -> Pixels:
    """The array `name` of an npz file, there as NAME[_uint8][_everyN]."""
    with np.load(path) as file:
        for stored in file.files:
            if match := re.fullmatch(rf"{name}(?:_uint8)?(?:_every(\d+))?", stored):
                return Pixels(file[stored], int(match[1] or 1))
    raise KeyError(f"{path} has no array {name}")
