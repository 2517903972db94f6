"""Reading torch's files without torch: the same numbers, or a sentence that says what is wrong.

The files in tests/golden/torch_bin were written by torch itself (see make_fixtures.py there); the
bad ones are put together here. What must never run is in test_malicious_pickles.py.
"""

import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava_mini_jax.errors import InputError
from llava_mini_jax.weights.files import open_tensors
from tests.weights.bad_files import (
    MAX_TEST_BYTES,
    MAX_TEST_SECONDS,
    Call,
    Name,
    Stored,
    program,
    refusal,
    tensor,
    write_zip,
)

FIXTURES = Path(__file__).parents[1] / "golden" / "torch_bin"
ZIP_AND_LEGACY = ["state_dict.bin", "state_dict_legacy.bin"]


# The same numbers as torch.


@pytest.mark.parametrize("file", ZIP_AND_LEGACY)
def test_every_tensor_of_torch_is_read_bit_for_bit(file: str) -> None:
    expected = open_tensors(FIXTURES / "expected.safetensors")
    found = open_tensors(FIXTURES / file)
    assert found.keys() == expected.keys()
    for name, lazy in found.items():
        array, wanted = lazy.read(), expected[name].read()
        assert (
            (lazy.shape, lazy.dtype) == (wanted.shape, wanted.dtype) == (array.shape, array.dtype)
        )
        assert array.tobytes() == wanted.tobytes(), name
        assert type(array) is np.ndarray and array.flags.owndata and array.flags.c_contiguous


@pytest.mark.parametrize("file", ZIP_AND_LEGACY)
def test_slices_of_strided_tensors_are_the_slices_of_the_whole(file: str) -> None:
    for lazy in open_tensors(FIXTURES / file).values():
        whole = lazy.read()
        for index in [(slice(1, 2),), (slice(None), slice(1, 3)), (slice(0, 2), slice(0, 2, 2))]:
            if len(index) <= len(lazy.shape):
                assert lazy.read(index).tobytes() == whole[index].tobytes(), (lazy.name, index)


@pytest.mark.parametrize("file", ["nested.bin", "protocol4.bin"])
def test_a_nested_state_dict_and_a_newer_pickle_protocol(file: str) -> None:
    expected = open_tensors(FIXTURES / "expected.safetensors")
    found = open_tensors(FIXTURES / file)
    assert found.keys() == {"view.transposed", "bfloat16"}
    for name, lazy in found.items():
        assert lazy.read().tobytes() == expected[name].read().tobytes()


def test_the_assembler_writes_what_torch_reads_as_a_tensor(tmp_path: Path) -> None:
    """Without this, a mistake in the assembler could stand behind every refusal below."""
    path = write_zip(
        tmp_path / "model.bin", program({"w": tensor(), "b": tensor(None, 1, (5,), (1,))})
    )
    found = open_tensors(path)
    assert found["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].read().tolist() == [1, 2, 3, 4, 5]


# Tensors that do not fit.


def float_storage(**changes: Any) -> tuple[Any, ...]:
    parts = {
        "tag": "storage",
        "kind": Name("torch", "FloatStorage"),
        "key": "0",
        "at": "cpu",
        "n": 6,
    }
    return tuple((parts | changes).values())


ODD_TENSORS = {
    "beyond the storage": (tensor(None, 1), "offset 1"),
    "stride beyond the storage": (tensor(None, 0, (2, 3), (4, 1)), "(4, 1)"),
    "far beyond": (tensor(None, 2**62, (1,), (1,)), str(2**62)),
    "huge stride": (tensor(None, 0, (2,), (2**100,)), str(2**100)),
    "negative offset": (tensor(None, -1), "-1"),
    "negative stride": (tensor(None, 0, (2, 3), (-3, 1)), "-3"),
    "negative size": (tensor(None, 0, (-2, 3)), "-2"),
    "size overflow": (tensor(None, 0, (2**40, 2**40), (0, 0)), str(2**40)),
    "empty overflow": (tensor(None, 0, (0, 2**63), (0, 0)), str(2**63)),
    "expanded bomb": (tensor(None, 0, (2**40,), (0,)), str(2**40)),
    "float size": (tensor(None, 0, (2.0, 3)), "2.0"),
    "bool size": (tensor(None, 0, (True, 3)), "True"),
    "text shape": (tensor(None, 0, "ab", (1, 1)), "shape"),
    "too many axes": (tensor(None, 0, (1,) * 65, (1,) * 65), "65"),
    "rank mismatch": (tensor(None, 0, (2, 3), (1,)), "(1,)"),
    "list strides": (tensor(None, 0, (2, 3), [3, 1]), "[3, 1]"),
    "pending negation": (tensor(None, 0, (6,), (1,), False, None, {"neg": True}), "neg"),
    "text for a storage": (
        Call(Name("torch._utils", "_rebuild_tensor"), ("0", 0, (6,), (1,))),
        "storage",
    ),
    "dtype of text": (
        Call(
            Name("torch._utils", "_rebuild_tensor_v3"),
            (Stored(float_storage()), 0, (6,), (1,), False, None, "float32"),
        ),
        "float32",
    ),
    "untyped without dtype": (
        tensor(float_storage(kind=Name("torch.storage", "UntypedStorage"))),
        "dtype",
    ),
    "identity of text": (tensor("storage"), "storage"),
    "other identity": (tensor(float_storage(tag="module")), "module"),
    "storage kind of text": (
        tensor(float_storage(kind="torch.FloatStorage")),
        "torch.FloatStorage",
    ),
    "dtype for a storage kind": (tensor(float_storage(kind=Name("torch", "float32"))), "float32"),
    "number for a key": (tensor(float_storage(key=0)), "storage"),
    "path for a key": (tensor(float_storage(key="../../etc/passwd")), "../../etc/passwd"),
    "negative count": (tensor(float_storage(n=-6)), "-6"),
    "storage shorter than stated": (tensor(float_storage(n=7)), "28"),
    "storage view": (tensor((*float_storage(), ("0", 0, 6))), "('0', 0, 6)"),
    "missing record": (tensor(float_storage(key="1")), "archive/data/1"),
}


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    wrong, said = ODD_TENSORS[name]
    assert said in refusal(write_zip(tmp_path / "model.bin", program({"w": wrong})))


NOT_STATE_DICTS = {
    "a tensor": (tensor(), "tensor"),
    "a list": ([tensor()], "list"),
    "a number among tensors": ({"w": tensor(), "step": 3}, "'step': 'int'"),
    "numbers for names": ({0: tensor()}, "0"),
    "nested twice": ({"a": {"b": tensor()}}, "'a': 'dict'"),
    "both usual keys": ({"model": {"w": tensor()}, "state_dict": {"w": tensor()}}, "state_dict"),
    "control characters": ({"\x1b[2J": tensor()}, "x1b"),
}


@pytest.mark.parametrize("name", NOT_STATE_DICTS)
def test_other_things_than_a_state_dict_are_refused(name: str, tmp_path: Path) -> None:
    value, said = NOT_STATE_DICTS[name]
    message = refusal(write_zip(tmp_path / "model.bin", program(value)))
    assert said in message and "dict of tensors was expected" in message
    assert "model.state_dict()" in message


# Containers.


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    good = (FIXTURES / "state_dict.bin").read_bytes()
    path = tmp_path / "model.bin"
    cases = {
        "cut": (good[:-1000], "cut short"),
        "web page": (b"<!DOCTYPE html>", "<!DO"),
        "no zip directory": (good[:100], "cut short"),
        "pickle changed": (good.replace(b"FloatStorage", b"FloatStOrage", 1), "checksum"),
    }
    for data, said in cases.values():
        path.write_bytes(data)
        message = refusal(path)
        assert said in message and "again" in message


def test_records_that_torch_never_writes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a zip bomb
        archive.writestr("archive/data.pkl", program({"w": tensor()}) + bytes(10**8))
    assert "compressed" in refusal(path)
    write_zip(path, program({"w": tensor()}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", program({"w": tensor(None, 0, (1,), (1,))}))
    assert "two records of one name" in refusal(path)
    write_zip(path, program({"w": tensor()}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    assert "byte order b'big'" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    assert "2 records TOP/data.pkl" in refusal(path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "model.bin", program({"w": tensor()}))
    found = open_tensors(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"no longer holds tensor 'w'.*open it again"):
        found["w"].read()


# Fuzz: the right values or an InputError, whatever the damage.


def read_all(path: Path) -> dict[str, tuple[Any, ...]] | None:
    """Names to (shape, dtype, bytes); None for a refusal. Any other exception fails the test."""
    start = time.perf_counter()
    try:
        found = {name: lazy.read() for name, lazy in open_tensors(path).items()}
    except InputError:
        return None
    finally:
        assert time.perf_counter() - start < MAX_TEST_SECONDS
    assert sum(array.nbytes for array in found.values()) < MAX_TEST_BYTES
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in found.items()}


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DAMAGE = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 255)), min_size=1, max_size=4)


def damaged(data: bytes, damage: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for position, bits in damage:
        changed[position % len(changed)] ^= bits
    return bytes(changed)


@FUZZ
@given(st.integers(0, 20_000), st.sampled_from(ZIP_AND_LEGACY))
def test_truncated_files_are_refused(tmp_path: Path, length: int, file: str) -> None:
    good = (FIXTURES / file).read_bytes()
    path = tmp_path / "model.bin"
    path.write_bytes(good[: length % len(good)])
    assert read_all(path) is None


@FUZZ
@given(DAMAGE)
@example([(0, 1)])
def test_a_damaged_archive_never_gives_wrong_values_silently(
    tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    """Bytes of the weights themselves aside: nothing in a zip file read in parts protects those."""
    good = (FIXTURES / "state_dict.bin").read_bytes()
    weights = weight_positions(FIXTURES / "state_dict.bin")
    damage = [(position, bits) for position, bits in damage if position % len(good) not in weights]
    path = tmp_path / "model.bin"
    path.write_bytes(damaged(good, damage))
    found = read_all(path)
    assert found is None or found == read_all(FIXTURES / "state_dict.bin")


def weight_positions(path: Path) -> set[int]:
    data, positions = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
                start = info.header_offset + 30 + sum(lengths)
                positions |= set(range(start, start + info.file_size))
    return positions


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@FUZZ
@given(DAMAGE)
def test_a_damaged_stream_is_read_or_refused(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(damaged((FIXTURES / "state_dict_legacy.bin").read_bytes(), damage))
    read_all(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # by pickletools, on the way
@FUZZ
@given(DAMAGE, st.binary(max_size=8), st.integers(0, 20_000))
def test_a_damaged_pickle_with_a_right_checksum_is_read_or_refused(
    tmp_path: Path, damage: list[tuple[int, int]], inserted: bytes, at: int
) -> None:
    with zipfile.ZipFile(FIXTURES / "nested.bin") as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    code = damaged(records["data.pkl"], damage)
    at %= len(code)
    data = {name[5:]: data for name, data in records.items() if name.startswith("data/")}
    read_all(write_zip(tmp_path / "model.bin", code[:at] + inserted + code[at:], data))
