"""Data fingerprints: any change of any kind of source is seen and named, and nothing else is."""

import dataclasses
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.fingerprint import changes, fingerprint, of_files
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
from llava_mini_jax.data.sets.yaml_list import read_list
from tests.data.data_files import config_of, turns

SUFFIXES = ("json", "jsonl", "parquet", "embedded.parquet", "folder", "built", "yaml")


def rows(answers, folder):
    """As many samples with an image as there are answers."""
    for number in range(len(answers)):
        if not (folder / f"{number}.png").exists():
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return [
        {"id": str(i), "image": f"{i}.png", "conversations": turns(answer=answer)}
        for i, answer in enumerate(answers)
    ]


def write(kind, folder, answers):
    """The data of this kind in the folder; what opens it."""
    made = rows(answers, folder)
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(made), path)
    elif kind in ("embedded.parquet", "folder"):
        for row in made:
            row["image"] = {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}
        path = path if kind != "folder" else folder / "many" / "0.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(made), path)
        path = path if kind != "folder" else path.parent
    else:
        path = folder / "data.json"
        path.write_text(json.dumps(made))
    if kind == "built":
        out = folder / "built"
        if out.exists():
            out.rename(folder / "built-before")
        assert cli.main(["data", "build", str(path), "--out", str(out)]) == 0
        return config_of(out)
    if kind == "yaml":
        (folder / "list.yaml").write_text("datasets:\n  - json_path: data.json\n")
        return config_of(*read_list(folder / "list.yaml"))
    return config_of(path)


def found(config):
    return json.loads(json.dumps(fingerprint(Samples(config))))  # as a checkpoint keeps it


@pytest.mark.parametrize("kind", SUFFIXES)
def test_other_text_of_the_same_length_is_seen(kind, tmp_path):
    config = write(kind, tmp_path, ["the digit is 3", "the digit is 4", "the digit is 5"])
    before = found(config)
    assert changes(before, found(config)) == []
    same = write(kind, tmp_path, ["the digit is 3", "the digit is 4", "the digit is 5"])
    if kind != "built":
        assert changes(before, found(same)) == []
    (tmp_path / "built-before").exists() and (tmp_path / "built-before").rename(tmp_path / "older")
    other = found(write(kind, tmp_path, ["the digit is 3", "the digit is 9", "the digit is 5"]))
    told = changes(before, other)
    assert told and all(" other content" in t or " bytes, it had " in t for t in told)
    assert of_files(before) != of_files(other)
    (tmp_path / "built-before").exists() and (tmp_path / "built-before").rename(tmp_path / "old")
    fewer = found(write(kind, tmp_path, ["the digit is 3", "the digit is 4"]))
    assert any("has 2 samples, it had 3" in told for told in changes(before, fewer))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "yaml"])
def test_pictures_of_other_sizes_are_seen_and_not_opened(kind, tmp_path):
    config = write(kind, tmp_path, ["3", "4", "5"])
    before = found(config)
    (tmp_path / "1.png").write_bytes(b"no image")
    told = changes(before, found(config))
    assert told == ["1 of 3 images or videos have other sizes, such as 1.png"]
    (tmp_path / "1.png").unlink()
    assert changes(before, found(config)) == told


def test_data_sets_that_come_and_go_are_named(tmp_path):
    config = write("json", tmp_path, ["3", "4"])
    (tmp_path / "more.json").write_text(json.dumps(rows(["5"], tmp_path)))
    more = config_of(*config.datasets, tmp_path / "more.json")
    assert changes(found(config), found(more)) == ["the data set more is new"]
    assert changes(found(more), found(config)) == ["the data set more is gone"]
    weighted = dataclasses.replace(config.datasets[0], weight=2.0)
    assert changes(found(config), found(config_of(weighted))) == ["data has 4 samples, it had 2"]


def test_rows_that_are_no_samples_do_no_harm(tmp_path):
    path = tmp_path / "odd.json"
    odd = [7, None, {"id": 1}, {"image": 3, "conversations": []}, {"image": ["a", "b"]}]
    path.write_text(json.dumps(odd))
    assert changes(found(config_of(path)), found(config_of(path))) == []


def test_digits():
    data, other = DigitsConfig(), DigitsConfig(split="heldout")
    assert changes(fingerprint(DigitsPages(data, 9)), fingerprint(DigitsPages(data, 9))) == []
    told = changes(fingerprint(DigitsPages(data, 9)), fingerprint(DigitsPages(data, 8)))
    assert told == ["digits-train has 8 samples, it had 9"]
    assert changes(fingerprint(DigitsPages(data, 9)), fingerprint(DigitsPages(other, 9)))


def test_samplings_of_one_file_are_told_by_their_numbers(tmp_path):
    config = write("json", tmp_path, ["3", "4", "5", "6"])
    first = Dataset(path=config.datasets[0].path, sampling="first:2")
    both = SourcesConfig(
        datasets=(first, config.datasets[0]), video=FrameSampling(fps=1.0, max_frames=4)
    )
    assert [part["samples"] for part in found(both).values()] == [2, 4]
