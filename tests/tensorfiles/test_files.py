"""Weight files: what is read from a folder, an index and a file, and how much of it."""

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.safetensors_header import DTYPES
from llava_mini_jax.tensorfiles.save import save_tensors
from tests.tensorfiles.bad_files import MAX_TEST_BYTES, header_bytes, refusal

FIXTURES = Path(__file__).parents[1] / "golden" / "torch_bin"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def arrays(count: int = 6) -> dict[str, np.ndarray]:
    """Tensors of 48 bytes."""
    return {
        f"layer.{n}": np.arange(n, n + 12, dtype=np.float32).reshape(3, 4) for n in range(count)
    }


def save_three_shards(folder: Path) -> dict[str, np.ndarray]:
    tensors = arrays()
    save_tensors(folder, tensors.items(), max_shard_bytes=100)
    return tensors


def assert_holds(path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = open_tensors(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].read().tobytes() == array.tobytes()


# Reading.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_slice_of_safetensors(dtype: np.dtype, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    saved = {"a": array, "scalar": np.array(array[1, 1, 1]), "empty": np.zeros((0, 3), dtype)}
    save_file(saved, tmp_path / "model.safetensors")
    found = open_tensors(tmp_path)
    for name, wanted in saved.items():
        read = found[name].read()
        assert read.shape == wanted.shape == found[name].shape
        assert read.dtype == wanted.dtype == found[name].dtype
        assert read.tobytes() == wanted.tobytes()
        assert type(read) is np.ndarray and read.flags.owndata and read.flags.writeable
        assert found[name].nbytes == wanted.nbytes
    for index in [
        (slice(1, 2),),
        (slice(None), slice(0, 0)),
        (slice(None), slice(1, 3), slice(2, 4)),
    ]:
        assert found["a"].read(index).tobytes() == array[index].tobytes()
    assert found["empty"].read((slice(0, 0), slice(1, 3))).shape == (0, 2)
    for wrong in [(0,), (slice(None),) * 4]:
        with pytest.raises(TypeError, match="cannot be cut"):
            found["a"].read(wrong)  # type: ignore[arg-type]


def test_only_the_asked_slice_is_read(tmp_path: Path) -> None:
    """From a file of 4 GB (with a hole for the weights), without the memory for it."""
    path, shape = tmp_path / "model.safetensors", (2**20, 2**10)
    nbytes = 4 * 2**30
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}
    with path.open("wb") as file:
        file.write(header_bytes({"w": entry}))
        start = file.tell()
        file.truncate(start + nbytes)
        file.seek(start + 4 * (2**19 * 2**10 + 5))
        file.write(np.float32(7).tobytes())
    tracemalloc.start()
    part = open_tensors(path)["w"].read((slice(2**19 - 1, 2**19 + 1), slice(4, 8)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.tolist() == [[0, 0, 0, 0], [0, 7, 0, 0]]
    assert peak < MAX_TEST_BYTES


def test_what_torch_wrote_as_safetensors(tmp_path: Path) -> None:
    """expected.safetensors is of safetensors.torch; the library reads all but float8 into numpy."""
    found = open_tensors(FIXTURES / "expected.safetensors")
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16
    assert found["float8_e4m3fn"].dtype == ml_dtypes.float8_e4m3fn
    same = {name: lazy.read() for name, lazy in found.items() if "float8" not in name}
    save_file(same, tmp_path / "same.safetensors")
    for name, array in load_file(tmp_path / "same.safetensors").items():
        assert array.tobytes() == found[name].read().tobytes()


def test_the_order_in_which_a_folder_is_searched(tmp_path: Path) -> None:
    bin_file = (FIXTURES / "protocol4.bin").read_bytes()
    torch_names = open_tensors(FIXTURES / "protocol4.bin").keys()
    (tmp_path / "mm_projector.bin").write_bytes(bin_file)
    assert "mm_projector.bin: name the file itself" in refusal(tmp_path)
    assert open_tensors(tmp_path / "mm_projector.bin").keys() == torch_names
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file)
    assert open_tensors(tmp_path).keys() == torch_names
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "shard.bin").write_bytes(bin_file)
    index = {"weight_map": dict.fromkeys(torch_names, "shard.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert open_tensors(tmp_path)["bfloat16"].file.name == "shard.bin"
    save_file({"one": np.ones(2)}, tmp_path / "part-a.safetensors")
    save_file({"two": np.ones(2)}, tmp_path / "part-b.safetensors")
    with pytest.warns(UserWarning, match=r"holds weights twice.*\.safetensors are read"):
        assert open_tensors(tmp_path).keys() == {"one", "two"}
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    save_file({"whole": np.ones(2)}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).keys() == {"whole"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "part-a.safetensors"}}))
    assert open_tensors(tmp_path).keys() == open_tensors(tmp_path / INDEX).keys() == {"one"}


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    """A new save over an old one: which is meant cannot be known, and no file is a part of both."""
    save_three_shards(tmp_path)
    save_file({"other": np.ones(2)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert "holds two models" in message and f"the one of {INDEX}, and model.safetensors" in message
    (tmp_path / INDEX).unlink()  # now the whole file would be read, its old shards lie beside it
    assert "the one of model.safetensors, and model-00001-of" in refusal(tmp_path)
    assert "and 2 more" in refusal(tmp_path)


def test_shards_of_an_older_save(tmp_path: Path) -> None:
    save_three_shards(tmp_path)
    save_file({"old": np.ones(2)}, tmp_path / "model-00004-of-00004.safetensors")
    assert "and model-00004-of-00004.safetensors, which does not belong to it" in refusal(tmp_path)


def test_two_models_of_torch(tmp_path: Path) -> None:
    bin_file = (FIXTURES / "protocol4.bin").read_bytes()
    names = open_tensors(FIXTURES / "protocol4.bin").keys()
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(bin_file)
    index = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert open_tensors(tmp_path).keys() == names
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file)
    assert "holds two models" in refusal(tmp_path)


def test_an_index_that_names_the_whole_file(tmp_path: Path) -> None:
    save_file({"whole": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"whole": "model.safetensors"}}))
    assert open_tensors(tmp_path).keys() == {"whole"}


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "download the model" in refusal(tmp_path / "org" / "model-7b")
    message = refusal(tmp_path)
    assert "holds no model weights" in message and "model.safetensors" in message
    (tmp_path / "notes.txt").write_text("hello")
    assert "'.txt'" in refusal(tmp_path / "notes.txt")
    (tmp_path / "empty.safetensors").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    assert "no tensors" in refusal(tmp_path / "none.safetensors")
    pointer = tmp_path / "pointer.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "Git LFS pointer" in refusal(pointer) and "git lfs pull" in refusal(pointer)
    (tmp_path / "folder.bin").mkdir()
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "folder.bin"}}))
    assert "folder.bin is not in its folder" in refusal(index)


# Shards.


def test_missing_shards(tmp_path: Path) -> None:
    save_three_shards(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert SHARDS[1] in refusal(tmp_path) and "download what is missing" in refusal(tmp_path)
    (tmp_path / INDEX).unlink()
    message = refusal(tmp_path)
    assert "2 of the 3 shards" in message and SHARDS[1] in message
    assert "download the rest" in message


def test_shards_without_an_index(tmp_path: Path) -> None:
    tensors = save_three_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert_holds(tmp_path, tensors)
    save_file({"layer.3": np.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"both hold tensor 'layer\.3'.*name the file"):
        open_tensors(tmp_path)


def test_an_index_that_does_not_fit_its_shards_reports_everything(tmp_path: Path) -> None:
    save_three_shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = SHARDS[0]  # in no file
    del index["weight_map"]["layer.1"]  # in a file, not in the index
    index["weight_map"]["layer.5"] = SHARDS[0]  # in another file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        open_tensors(tmp_path)
    message = str(caught.value)
    assert f"'ghost' is not in {SHARDS[0]}" in message
    assert f"'layer.1' is in {SHARDS[0]}, which the index does not say" in message
    assert f"'layer.5' is not in {SHARDS[0]}" in message
    assert f"'layer.5' is in {SHARDS[2]}" in message
    assert INDEX in message and "download the whole folder again" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a readable index"),
        ("{", "not a readable index"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"w": 3}}', "3"),
        (
            '{"weight_map": {"w": "../model.safetensors"}}',
            "'../model.safetensors', where the plain",
        ),
        ('{"weight_map": {"w": "/other/model.bin"}}', "'/other/model.bin', where the plain name"),
        ('{"weight_map": {"w": "model.safetensors.index.json"}}', "index.json"),
        ('{"weight_map": {"w": "a.bin", "w": "b.bin"}}', "'w' appears in it 2 times"),
        ('{"weight_map": {"w": "a.bin"}, "\\ud800": 1}', "a.bin"),
    ],
)
def test_bad_indices(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    message = refusal(tmp_path / INDEX)
    assert said in message and "download" in message
