"""Fuzz of torch's files: the right values or an InputError, whatever the damage."""

import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from tests.tensorfiles.bad_files import MAX_TEST_BYTES, MAX_TEST_SECONDS, write_zip

FIXTURES = Path(__file__).parents[1] / "golden" / "torch_bin"
FILES = ["state_dict.bin", "state_dict_legacy.bin"]


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
@given(st.integers(0, 20_000), st.sampled_from(FILES))
@example(-1, FILES[0])
@example(-1, FILES[1])
def test_truncated_files_are_refused(tmp_path: Path, length: int, file: str) -> None:
    good = (FIXTURES / file).read_bytes()
    path = tmp_path / "model.bin"
    path.write_bytes(good[: length % len(good)])
    with pytest.raises(InputError):
        open_tensors(path)


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
