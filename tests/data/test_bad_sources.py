"""Data sets that cannot be read: every fault is one clear sentence, and none takes much memory."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini_jax.data.sources import Dataset, Samples, read_list
from llava_mini_jax.errors import InputError
from tests.data.data_files import config_of, rows, turns, write


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "no JSON"),
        ("a.json", '{"id": 1}\n{"id": 2}', 'name the file "[.]jsonl"'),
        ("a.json", '{"id": 1}', "holds a dict; expected a list"),
        ("a.json", "[]", "holds no samples"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "", "holds no samples"),
        ("a.jsonl", "\n \n", "holds no samples"),
        ("a.csv", "x", 'ends in ".csv"; expected .json, .jsonl, .parquet'),
        ("a.json", None, "there is no such file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Samples(config_of(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "item 1 is 3; expected a sample"),
        ({}, 'has no "conversations"'),
        ({"q": "a", "a": None}, "has no \"conversations\" .* but 'q', 'a'"),
        ({"image": 3, "conversations": turns()}, '"image" is 3; expected a path'),
        ({"image": ["a", "b"], "conversations": turns()}, '"image" are 2'),
        ({"image": "a", "video": "b", "conversations": turns()}, "image and video"),
        ({"video": "nowhere", "conversations": turns()}, "there is no video"),
        ({"video": "\0", "conversations": turns()}, "there is no video"),
        ({"conversations": turns("\ud800")}, "half of a surrogate pair"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = write(tmp_path / "rows.json", [row])
    samples = Samples(config_of(path))
    with pytest.raises(InputError, match=message) as caught:
        samples[0]
    assert "rows.json, item 1" in str(caught.value) and "\n" not in str(caught.value)
    assert samples.id_of(0) == "rows-0"


def test_bad_configs(tmp_path):
    path = write(tmp_path / "rows.json", rows(1))
    with pytest.raises(InputError, match=r"folder of pictures .*nowhere does not exist"):
        Samples(config_of(Dataset(path=path, images=str(tmp_path / "nowhere"))))
    with pytest.raises(InputError, match=r"holds no \.parquet files"):
        Samples(config_of(tmp_path))
    for wrong in ("some", "first", "first:-1", "random:1.5%", "first:3 "):
        with pytest.raises(InputError, match="the sampling is"):
            Dataset(path=path, sampling=wrong)
    with pytest.raises(InputError, match="no datasets"):
        config_of()
    for change in (dict(fps=0.0), dict(max_frames=0), dict(seed=-1)):
        with pytest.raises(InputError):
            config_of(path, **change)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of(path).fps = 2.0


# Values near to samples reach further into the reader than any bytes do.
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("gpt"),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "image", "video", "conversations", "from", "value", "q", "a"]),
            v,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(
    content=st.binary(max_size=60)
    | st.lists(_VALUES, max_size=3).map(lambda rows: json.dumps(rows).encode())
    | st.lists(_VALUES, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    suffix=st.sampled_from([".json", ".jsonl", ".yaml"]),
)
def test_any_bytes_are_samples_or_an_input_error(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"any{suffix}"
        path.write_bytes(content)
        try:
            samples = Samples(config_of(*read_list(path) if suffix == ".yaml" else [path]))
        except InputError as error:
            assert str(error)
            return
        for i in range(len(samples)):
            try:
                assert {"id", "conversations", "kind"} <= samples[i].keys()
            except InputError:
                assert isinstance(samples.id_of(i), str | int)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps(rows(1)).encode().replace(b"hello", b"\xff\xfe"))
    with pytest.raises(InputError, match="no JSON"):
        Samples(config_of(path))


def test_json_lines_are_not_all_in_memory(tmp_path):
    """Opening 100 MB and reading one sample takes a fraction of that."""
    path = tmp_path / "big.jsonl"
    line = json.dumps({"id": 1, "conversations": turns("x" * 10_000)}) + "\n"
    with path.open("w") as file:
        for _ in range(100):
            file.write(line * 100)
    code = """
import sys, tracemalloc
from llava_mini_jax.data.sources import Dataset, Samples, SourcesConfig
config = SourcesConfig(datasets=(Dataset(path=sys.argv[1]),), fps=1.0, max_frames=1)
tracemalloc.start()
samples = Samples(config)
samples[9_999]
print(len(samples), tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert count == 10_000 and peak < 32e6  # a piece of the scan, 16 MB, compared byte by byte
