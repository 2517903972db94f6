"""One array compared with a recorded one; what the readers of golden cases share.

outputs.npz: expected --.
this code: found -------+--largest error--> Check, ok or FAILED
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Check:
    array: str
    shape: tuple[int, ...]
    error: float  # largest absolute error; for gradients relative to the tensor's largest value
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # False for nan

    def line(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        shape = "x".join(map(str, self.shape)) or "scalar"
        return (
            f"{self.array:<60} {shape:>16}  largest error {self.error:9.2e}"
            f"  tolerance {self.tolerance:.0e}  {verdict}"
        )


def read_case(folder: Path, *more: str) -> tuple[dict[str, Any], dict, dict]:
    """(what case.json says, inputs, outputs); InputError where a file is missing or no archive."""
    for name in ("case.json", "inputs.npz", "outputs.npz", *more):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a golden case: {name} is missing")
    about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    arrays = []
    for name in ("inputs.npz", "outputs.npz"):
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                arrays.append({key: file[key] for key in file.files})
        except Exception as error:
            raise InputError(f"{folder / name} cannot be read ({error}): restore it") from None
    return about, arrays[0], arrays[1]
