"""Safetensors files: the header checked, every tensor placed.

    | 8 bytes: length n | n bytes of JSON: name -> dtype, shape, [begin, end] | tensors, no gaps |
              |                              |                                      |
       n inside the file?      names once, known dtypes, sizes that fit,   begin..end touch and
                               numbers that are numbers                    fill the file exactly
              '------------------------------+--------------------------------------'
                                             |
                               {name: LazyTensor}   or one sentence that says what is wrong

The `safetensors` library then reads the header too and must name the same tensors. Reading tensors
is left to `LazyTensor`, because the library's numpy side knows no float8 and cannot cut an empty
tensor. The format: https://github.com/huggingface/safetensors#format
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor, contiguous_strides, shape_problem

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}

# A header takes about 100 bytes for each tensor, and several Python objects: a limit far above
# every model keeps a made-up file from filling the memory.
MAX_HEADER_BYTES = 32 * 2**20
DAMAGED = "the file is cut short, damaged or not a safetensors file, so download it again."


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of one safetensors file, in the order of its header.

    Raises InputError, in one sentence, for whatever is wrong with the header; a file that passes
    has every byte of every tensor.
    """
    with path.open("rb") as file:
        file_bytes = path.stat().st_size
        header, data_start = _read_header(file, path, file_bytes)
    header.pop("__metadata__", None)
    data_bytes = file_bytes - data_start
    tensors, ranges = {}, []
    for name, entry in header.items():
        try:
            shape, dtype, begin, end = _checked(name, entry, data_bytes)
        except ValueError as error:
            raise _damaged(path, f"states for tensor {short(name)} that {error}") from None
        strides = contiguous_strides(shape, dtype.itemsize)
        tensors[name] = LazyTensor(name, shape, dtype, path, data_start + begin, strides)
        ranges.append((begin, end, name))
    _check_coverage(path, sorted(ranges), data_bytes)
    _check_library_agrees(path, set(tensors))
    return tensors


def strict_json(data: bytes) -> Any:
    """JSON with no name twice in an object; every problem is a ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {short(name)} stands in it {times} times")
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The parsed header and where the tensors begin."""
    if file_bytes < 8:
        raise _damaged(path, f"has {file_bytes} bytes where at least 8 were expected")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > file_bytes - 8:
        raise _damaged(
            path,
            f"announces a header of {header_bytes:,} bytes, where {file_bytes - 8:,} bytes follow",
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise _damaged(
            path,
            f"announces a header of {header_bytes:,} bytes where at most {MAX_HEADER_BYTES:,} "
            "were expected",
        )
    data = file.read(header_bytes)
    try:
        header = strict_json(data)
    except ValueError as error:
        raise _damaged(
            path, f"has a header that is not JSON ({short(data[:40])}: {error})"
        ) from None
    if not isinstance(header, dict):
        raise _damaged(path, f"has the header {short(header)} where a JSON object was expected")
    return header, 8 + header_bytes


def _checked(name: str, entry: Any, data_bytes: int) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """(shape, dtype, begin, end) of one header entry; ValueError says what is wrong with it."""
    if not name.isprintable():  # would reach terminals and file names
        raise ValueError("its name has characters that cannot be printed")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"it is {short(entry)}, where dtype, shape and data_offsets were expected")
    stated, offsets = entry["dtype"], entry["data_offsets"]
    dtype = DTYPES.get(stated) if isinstance(stated, str) else None
    if dtype is None:
        raise ValueError(
            f"its dtype is {short(stated)}, where one of {', '.join(DTYPES)} was expected (a "
            "tensor of any other has to be saved again as one of these)"
        )
    if problem := shape_problem(entry["shape"], dtype.itemsize):
        raise ValueError(problem)
    shape = tuple(entry["shape"])
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(
            f"its data_offsets are {short(offsets)}, where two whole numbers were expected"
        )
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        raise ValueError(
            f"it lies at bytes {short(offsets)} of the data, of which there are {data_bytes:,}"
        )
    expected = contiguous_strides((1, *shape), dtype.itemsize)[0]
    if end - begin != expected:
        raise ValueError(
            f"it has {end - begin:,} bytes, where {stated} of shape {short(shape)} has {expected:,}"
        )
    return shape, dtype, begin, end


def _check_coverage(path: Path, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Refuse tensors that overlap or leave bytes unaccounted for; `ranges` is sorted by begin."""
    previous_end, previous = 0, "the header"
    for begin, end, name in ranges:
        if begin < previous_end:
            raise _damaged(
                path,
                f"places tensor {short(name)} at byte {begin:,} of the data, where {previous} "
                f"reaches to byte {previous_end:,}: they overlap",
            )
        if begin > previous_end:
            raise _damaged(
                path,
                f"leaves bytes {previous_end:,} to {begin:,} of the data between {previous} and "
                f"tensor {short(name)} to no tensor",
            )
        previous_end, previous = end, f"tensor {short(name)}"
    if previous_end != data_bytes:
        raise _damaged(
            path,
            f"has {data_bytes:,} bytes of data where its header accounts for {previous_end:,}",
        )


def _check_library_agrees(path: Path, names: set[str]) -> None:
    """Two readers that understand one header differently are how bad files slip through."""
    try:
        with safe_open(path, framework="numpy") as opened:
            library_names = set(opened.keys())
    except SafetensorError as error:
        raise _damaged(path, f"is refused by the safetensors library ({error})") from error
    if library_names != names:
        differing = sorted(library_names ^ names)
        raise _damaged(path, f"names tensors in a doubtful way: {short(differing)}")


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{path} {problem}; {DAMAGED}")
