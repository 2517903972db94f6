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

from llava_mini_jax.data.sets.sources import Dataset, Samples
from llava_mini_jax.data.sets.yaml_list import read_list
from llava_mini_jax.errors import InputError
from tests.conftest import ROOT
from tests.data.data_files import config_of, rows, turns, write


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "not valid JSON"),
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
    with pytest.raises(InputError, match=r"folder of images .*nowhere does not exist"):
        Samples(config_of(Dataset(path=path, images=str(tmp_path / "nowhere"))))
    with pytest.raises(InputError, match=r"holds no \.parquet files"):
        Samples(config_of(tmp_path))
    for wrong in ("some", "first", "first:-1", "random:1.5%", "first:3 "):
        with pytest.raises(InputError, match="the sampling is"):
            Dataset(path=path, sampling=wrong)
    with pytest.raises(InputError, match="no datasets"):
        config_of()
    with pytest.raises(InputError, match="must be 0 or more"):
        config_of(path, seed=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of(path).seed = 2


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
    with pytest.raises(InputError, match="not valid JSON"):
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
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
config = SourcesConfig(datasets=(Dataset(path=sys.argv[1]),), video=FrameSampling(fps=1))
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


def laughs(levels: int, end: str) -> str:
    """Aliases of aliases: 9 ** levels values in some hundred bytes."""
    lines = ["a0: &a0 {json_path: rows.json}" if end.startswith("<<") else "a0: &a0 lol"]
    for i in range(1, levels):
        nine = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(
            f"a{i}: &a{i} " + (f"{{<<: [{nine}]}}" if end.startswith("<<") else f"[{nine}]")
        )
    return "\n".join([*lines, "datasets:", f"  - {end.format(levels - 1)}\n"])


@pytest.mark.parametrize("end", ["*a{}", "json_path: *a{}", "{{*a{}: 1}}", "<<: *a{}"])
def test_a_list_whose_aliases_multiply_is_refused_at_once(end, tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(laughs(30, end))
    module = "llava_mini_jax.data.sets.yaml_list"
    script = f"import sys; from {module} import read_list; read_list(sys.argv[1])"
    ended = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "InputError: The list" in ended.stderr and "aliases that stand for more" in ended.stderr


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 50_000, "datasets: [&a [*a]]", "- &a {b: *a}"]
)
def test_deep_lists_and_lists_of_themselves_are_one_sentence(text, tmp_path):
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        read_list(tmp_path / "list.yaml")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_aliases_that_do_not_multiply_are_read(tmp_path):
    (tmp_path / "list.yaml").write_text(
        "common: &common {sampling_strategy: 'first:3', weight: 2}\n"
        "datasets:\n  - {<<: *common, json_path: a.json}\n  - {<<: *common, json_path: b.json}\n"
    )
    found = read_list(tmp_path / "list.yaml")
    assert [(Path(d.path).name, d.sampling, d.weight) for d in found] == [
        ("a.json", "first:3", 2.0), ("b.json", "first:3", 2.0),
    ]  # fmt: skip
