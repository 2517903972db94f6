"""Safetensors files: the library checks the header, and every tensor gets its place in the file.

    | 8 bytes: length n | n bytes of JSON: name -> dtype, shape, [begin, end] | tensors, no gaps |
               |                               |
       `safe_open` refuses sizes that do not fit, overlaps, gaps, bytes too few or too many
               '-------------------------------+--------> {name: LazyTensor}, or one sentence

A name that appears twice in a header is refused here: the library takes the last one in silence.
`LazyTensor` reads, because the library's numpy side knows no float8, cannot cut an empty tensor,
and cannot convert on the way from the file.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor, contiguous_strides, shape_problem

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}

# A header takes about 100 bytes for each tensor, and several Python objects: a limit far above
# every model keeps a made-up file from filling the memory.
MAX_HEADER_BYTES = 32 * 2**20


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of one safetensors file, in the order of its header.

    Raises InputError, in one sentence, for whatever is wrong with the header; a file that passes
    has every byte of every tensor.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                limit = f"{MAX_HEADER_BYTES:,} at most are read"
                raise ValueError(f"a header of {header_bytes:,} bytes, where {limit}")
            with safe_open(path, framework="numpy"):  # checks the header, reads no tensor
                header = strict_json(file.read(header_bytes))
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        return {name: _placed(path, name, entry, start) for name, entry in header.items()}
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{path} of {path.stat().st_size:,} bytes is not a complete safetensors file"
            f" ({short(str(error), 200)}); it is cut short, damaged or something else, so"
            " download it again."
        ) from error


def _placed(path: Path, name: str, entry: dict[str, Any], data_start: int) -> LazyTensor:
    """One entry of a header that the library has checked; ValueError for what numpy cannot hold."""
    stated, shape = entry["dtype"], tuple(entry["shape"])
    if (dtype := DTYPES.get(stated)) is None:
        raise ValueError(f"tensor {short(name)} is of dtype {stated}, none of {', '.join(DTYPES)}")
    # A name would reach terminals and file names.
    unprintable = None if name.isprintable() else "its name has characters that cannot be printed"
    if problem := unprintable or shape_problem(shape, dtype.itemsize):
        raise ValueError(f"of tensor {short(name)}: {problem}")
    return LazyTensor(
        name,
        shape,
        dtype,
        file=path,
        offset=data_start + entry["data_offsets"][0],
        strides=contiguous_strides(shape, dtype.itemsize),
    )


def strict_json(data: bytes) -> Any:
    """JSON with no name twice in an object; every problem is a ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {short(name)} appears in it {times} times")
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
