"""Tensors written as torch's own file (torch >= 1.6), without torch: the inverse of torch_bin.py.

{name: array} --> zip: archive/data.pkl       a dict of _rebuild_tensor_v2 over storages
                       archive/data/N         bytes of storage N, row-major
                       archive/byteorder, archive/version
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llava_mini_jax.errors import InputError

_STORAGES = {
    "float64": b"DoubleStorage",
    "float32": b"FloatStorage",
    "float16": b"HalfStorage",
    "bfloat16": b"BFloat16Storage",
}


def save_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A file that `torch.load(path, weights_only=True)` reads as a dict of tensors.

    Raises InputError for an array of another dtype than torch's floats.
    """
    pickled = [b"\x80\x02}("]  # protocol 2, a dict, its items
    arrays = {name: np.array(array, order="C") for name, array in tensors.items()}
    for number, (name, array) in enumerate(arrays.items()):
        if array.dtype.name not in _STORAGES:
            raise InputError(
                f"{name} is {array.dtype.name}, which {path.name} cannot hold; give one of "
                f"{', '.join(_STORAGES)}"
            )
        pickled += [_text(name), _tensor(array, str(number))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join([*pickled, b"u."]))
        archive.writestr("archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{number}", array.tobytes())
        archive.writestr("archive/version", b"3\n")


def _tensor(array: np.ndarray, key: str) -> bytes:
    """Opcodes of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides = [step // array.itemsize for step in array.strides]
    kind = b"ctorch\n" + _STORAGES[array.dtype.name] + b"\n"
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _number(array.size)
    arguments = storage + b"tQ" + _number(0) + _tuple(array.shape) + _tuple(strides) + b"\x89"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR"


def _tuple(numbers: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded
