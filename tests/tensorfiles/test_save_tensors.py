"""The sharded writer: Hugging Face's layout, one shard of memory, and all or nothing."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import load_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.save import save_tensors

INDEX = "model.safetensors.index.json"


def arrays(count: int = 6) -> dict[str, np.ndarray]:
    """Tensors of 48 bytes."""
    return {
        f"layer.{n}": np.arange(n, n + 12, dtype=np.float32).reshape(3, 4) for n in range(count)
    }


def assert_holds(path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = open_tensors(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].read().tobytes() == array.tobytes()


def test_one_shard_is_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    files = save_tensors(folder, arrays().items())
    assert files == [folder / "model.safetensors"] == list(folder.iterdir())
    assert_holds(folder, arrays())
    assert b'"__metadata__":{"format":"pt"}' in files[0].read_bytes()


def test_shards_and_index_are_those_of_hugging_face(tmp_path: Path) -> None:
    tensors = arrays() | {"layer.9": np.arange(100, dtype=np.float64)}
    folder = tmp_path / "larger"  # with a tensor larger than a shard
    files = save_tensors(folder, tensors.items(), max_shard_bytes=100)
    split = split_state_dict_into_shards_factory(
        tensors,
        max_shard_size=100,
        filename_pattern="model{suffix}.safetensors",
        get_storage_size=lambda array: array.nbytes,
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    assert {file.name for file in files} == {*split.filename_to_tensors, INDEX}
    assert (folder / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    for name, names in split.filename_to_tensors.items():
        assert load_file(folder / name).keys() == set(names)
    assert_holds(folder, tensors)


def test_unusual_arrays_are_saved_as_what_they_hold(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    saved = {"t": base.T, "step": base[:, ::2], "scalar": np.array(3, ml_dtypes.bfloat16)}
    save_tensors(tmp_path, [*saved.items(), ("big", base.astype(">f4"))])
    assert_holds(tmp_path, saved | {"big": base})


def test_files_can_be_read_by_whom_the_folder_allows(tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    files = save_tensors(tmp_path, arrays().items(), max_shard_bytes=100)
    assert {file.stat().st_mode for file in files} == {(tmp_path / "probe").stat().st_mode}


def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    shard_bytes = 4_000_000

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for number in range(40):
            yield f"w{number}", np.full(250_000, number, np.float32)

    tracemalloc.start()
    save_tensors(tmp_path, stream(), max_shard_bytes=shard_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(open_tensors(tmp_path)) == 40
    assert peak < 1.6 * shard_bytes  # the next shard's first tensor, and the one being made


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, InputError])
@pytest.mark.parametrize("existing", [True, False])
def test_nothing_half_written_stays(
    error: type[BaseException], existing: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "model"
    if existing:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def interrupted() -> Iterator[tuple[str, np.ndarray]]:
        yield from arrays().items()
        raise error("stop")

    with pytest.raises(error, match="stop"):
        save_tensors(folder, interrupted(), max_shard_bytes=100)
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == (["config.json", "deep", "model"] if existing else [])


def test_an_interrupt_among_the_last_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "model-00003-of-00003.safetensors":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path, arrays().items(), max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    def failure(folder: Path, tensors: list[tuple[str, Any]]) -> str:
        with pytest.raises(InputError) as caught:
            save_tensors(folder, tensors)
        return str(caught.value)

    ones = np.ones(2)
    assert "'w'" in failure(tmp_path, [("w", ones), ("w", ones)])
    assert "__metadata__" in failure(tmp_path, [("__metadata__", ones)])
    assert "complex128" in failure(tmp_path, [("w", ones.astype(complex))])
    assert "object" in failure(tmp_path, [("w", np.array([None]))])
    assert "give at least one" in failure(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert "is a file" in failure(tmp_path / "file", [("w", ones)])
    save_tensors(tmp_path / "model", [("w", ones)])
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    message = failure(tmp_path / "model", [("v", ones)])
    assert "already holds model.safetensors" in message and "new folder" in message
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
