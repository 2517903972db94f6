"""Files that a reader has to refuse: a small assembler for pickles, and the check of a refusal."""

import json
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors

MAX_TEST_BYTES = 100_000_000  # far above every file of the tests, far below every bomb
MAX_TEST_SECONDS = 20


def refusal(path: Path) -> str:
    """The message with which a file is refused, after little memory and time; it names the file."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(InputError) as caught:
            for lazy in open_tensors(path).values():
                lazy.read()
        assert tracemalloc.get_traced_memory()[1] < MAX_TEST_BYTES
        assert time.perf_counter() - start < MAX_TEST_SECONDS
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


def header_bytes(entries: Any) -> bytes:
    """The length and the JSON with which a safetensors file begins."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


# A small assembler: Python values, and these four, into pickle opcodes.
class Name(NamedTuple):
    module: str
    attribute: str


class Call(NamedTuple):
    function: Any
    arguments: Any


class Stored(NamedTuple):
    identity: Any


class Code(NamedTuple):
    opcodes: bytes


def encode(value: Any) -> bytes:
    match value:
        case Code(opcodes):
            return opcodes
        case Name(module, attribute):
            return f"c{module}\n{attribute}\n".encode()
        case Call(function, arguments):
            return encode(function) + encode(arguments) + b"R"
        case Stored(identity):
            return encode(identity) + b"Q"
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"\x8a" + bytes([16]) + value.to_bytes(16, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    raise AssertionError(value)


def program(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def write_zip(path: Path, data_pkl: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in (records or {"0": np.arange(6, dtype="<f4").tobytes()}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def tensor(
    identity: Any = None, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), *more: Any
) -> Call:
    """What torch writes for a float32 tensor of a storage of six elements, or what is given."""
    identity = identity or ("storage", Name("torch", "FloatStorage"), "0", "cpu", 6)
    arguments = more or (False, Call(Name("collections", "OrderedDict"), ()))
    function = Name("torch._utils", "_rebuild_tensor_v2")
    return Call(function, (Stored(identity), offset, shape, strides, *arguments))
