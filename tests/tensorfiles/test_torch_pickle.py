"""Reading torch's files without torch: the same numbers, or a sentence that says what is wrong.

The files in tests/golden/torch_bin were written by torch itself (see make_fixtures.py there); the
bad ones are put together here. What must never run is in test_malicious_pickles.py.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from tests.tensorfiles.bad_files import (
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


def test_the_stride_of_an_axis_of_one_element_means_nothing(tmp_path: Path) -> None:
    wide = tensor(None, 1, (1, 3), (2**100, 1))
    found = open_tensors(write_zip(tmp_path / "model.bin", program({"w": wide})))
    assert found["w"].read().tolist() == [[1, 2, 3]]


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
    "float stride": (tensor(None, 0, (2, 3), (3.0, 1)), "3.0"),
    "float offset": (tensor(None, 0.0), "0.0"),
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


def test_a_record_that_seems_to_begin_elsewhere_is_refused(tmp_path: Path) -> None:
    """The lengths of its name and extra field say where the numbers begin."""
    good = bytearray((FIXTURES / "state_dict.bin").read_bytes())
    header = good.index(b"state_dict/data/3") - 30
    for place in (header + 26, header + 28, header + 30):  # length, other length, name
        for change in (4, 8, 64, -4):
            data = good.copy()
            data[place] = (data[place] + change) % 256
            (tmp_path / "model.bin").write_bytes(data)
            assert "damaged record 'state_dict/data/3'" in refusal(tmp_path / "model.bin")


def test_a_stream_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    good = (FIXTURES / "state_dict_legacy.bin").read_bytes()
    at = good.index(b"\x88", good.index(b"little_endian"))
    (tmp_path / "model.bin").write_bytes(good[:at] + b"\x89" + good[at + 1 :])
    assert "'little_endian': False" in refusal(tmp_path / "model.bin")


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
