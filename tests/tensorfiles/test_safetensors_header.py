"""Safetensors headers that lie, or were damaged: refused, each with what is wrong."""

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from tests.tensorfiles.bad_files import MAX_TEST_SECONDS, header_bytes, refusal


def entry(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LYING = {  # what the library refuses
    "empty": b"",
    "length beyond the file": b"\x40" + bytes(7) + b"{}",
    "not valid JSON": header_bytes(b"{'w': 1}"),
    "no UTF-8": header_bytes(b'{"\xff": 1}'),
    "deep JSON": header_bytes(b'{"w":' + b"[" * 100_000),
    "huge number": header_bytes(b'{"w": ' + b"9" * 5000 + b"}"),
    "a list": header_bytes(b"[]"),
    "no entry": header_bytes({"w": 3}),
    "missing fields": header_bytes({"w": {"dtype": "F32"}}),
    "a field twice": header_bytes(
        b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}'
    )
    + b"1",
    "unknown dtype": header_bytes({"w": entry(dtype="F7")}) + bytes(16),
    "dtype of a list": header_bytes({"w": entry(dtype=["F32"])}) + bytes(16),
    "negative shape": header_bytes({"w": entry(shape=(-4,))}) + bytes(16),
    "shape of text": header_bytes({"w": entry(shape="4")}) + bytes(16),
    "shape of floats": header_bytes({"w": entry(shape=(4.0,))}) + bytes(16),
    "shape of bools": header_bytes({"w": entry(shape=(True,), end=4)}) + bytes(4),
    "overflow": header_bytes({"w": entry(shape=(2**62, 4))}) + bytes(16),
    "size and shape differ": header_bytes({"w": entry(shape=(3,))}) + bytes(16),
    "outside of the file": header_bytes({"w": entry()}) + bytes(12),
    "negative offset": header_bytes({"w": entry(begin=-16, end=0)}) + bytes(16),
    "backwards": header_bytes({"w": entry(begin=16, end=0)}) + bytes(16),
    "three offsets": header_bytes({"w": entry() | {"data_offsets": [0, 8, 16]}}) + bytes(16),
    "overlap": header_bytes({"w": entry(), "v": entry(8, 24)}) + bytes(24),
    "same place": header_bytes({"w": entry(), "v": entry()}) + bytes(16),
    "hole": header_bytes({"w": entry(), "v": entry(20, 36)}) + bytes(36),
    "hole at the start": header_bytes({"w": entry(4, 20)}) + bytes(20),
    "trailing bytes": header_bytes({"w": entry()}) + bytes(20),
    "metadata of numbers": header_bytes({"w": entry(), "__metadata__": {"a": 1}}) + bytes(16),
    "lone surrogate": header_bytes(b'{"\\ud800": 1}'),
}
ODD = {  # what it lets pass, or would say less well, and what the message has to say
    "too short": (b"1234567", "7 bytes"),
    "huge length": (b"\xff" * 8 + b"{}", f"{2**64 - 1:,} bytes"),
    "web page": (b"<!DOCTYPE html>....", "33,554,432 at most"),
    "name twice": (
        header_bytes(b'{"w": %b, "w": %b}' % ((json.dumps(entry()).encode(),) * 2)) + bytes(16),
        "'w' appears in it 2 times",
    ),
    "control characters": (
        header_bytes({"\x1b[2J": entry()}) + bytes(16),
        "cannot be printed",
    ),
    "half a byte": (header_bytes({"w": entry(end=2, dtype="F4")}) + bytes(2), "dtype F4"),
    "empty overflow": (header_bytes({"w": entry(shape=(0, 2**63), end=0)}), str(2**63)),
    "too many axes": (header_bytes({"w": entry(shape=(1,) * 65, end=4)}) + bytes(4), "65"),
}


@pytest.mark.parametrize("name", LYING)
def test_lying_headers_are_refused_in_the_librarys_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING[name])
    with pytest.raises(SafetensorError) as reason:
        load_file(path)
    message = refusal(path)
    assert f"{len(LYING[name]):,} bytes" in message and "download it again" in message
    assert repr(str(reason.value))[1:60] in message


@pytest.mark.parametrize("name", ODD)
def test_odd_headers_are_refused(name: str, tmp_path: Path) -> None:
    data, said = ODD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    message = refusal(path)
    assert said in message and "download it again" in message


def test_a_header_of_32_megabytes_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**25 + 1).to_bytes(8, "little"))
        file.truncate(2**26)
    assert "33,554,433 bytes" in refusal(path)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FUZZED = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int16),
    "h": np.array(2.5, ml_dtypes.bfloat16),
    "e": np.zeros((0, 2), np.uint8),
}


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 1000)),
)
def test_damaged_safetensors_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path, damage: list[tuple[int, int]], cut: int | None
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(FUZZED, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    for position, bits in damage:
        data[position % len(data)] ^= bits
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    start = time.perf_counter()
    try:
        found = {name: lazy.read() for name, lazy in open_tensors(path).items()}
    except InputError:
        return
    finally:
        assert time.perf_counter() - start < MAX_TEST_SECONDS
    try:
        library = load_file(path)
    except (SafetensorError, KeyError, AttributeError):  # float8: not in the library's numpy side
        assert any(array.dtype.name.startswith("float8") for array in found.values())
        return
    assert found.keys() == library.keys()
    for name, array in library.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
