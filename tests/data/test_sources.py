"""Data sets on disk: every format gives LLaVA's samples, drawn and ordered as asked."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets
from llava_mini_jax.data.batches.pipeline import Encoder, make_batches
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, Samples
from llava_mini_jax.data.sets.yaml_list import read_list
from llava_mini_jax.errors import InputError
from tests import tiny_model
from tests.data.data_files import ANSWER, config_of, ids, rows, turns, write

IMAGES = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=32))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(folder / "red.png")
    tiny_model.write_video(folder / "v_clip.mp4", seconds=3)
    return folder


MIXED = [
    {"id": "text", "conversations": turns("hello")},
    {"id": 7, "image": "red.png", "conversations": turns()},
    {"id": "film", "video": "v_clip.mp4", "conversations": turns()},
    {"id": "old film", "video": "v_clip.mp4", "conversations": turns("what is it?\n<video>")},
    {"q": "what is it?", "a": ANSWER, "video_id": "v_clip"},
    {"image": None, "conversations": turns("no id")},
    {"id": "listed", "images": ["red.png"], "conversations": turns()},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_and_video_chatgpt_rows_reach_the_model(tmp_path, pictures, suffix):
    path = write(tmp_path / f"mixed{suffix}", MIXED)
    samples = Samples(config_of(Dataset(path=path, images=str(pictures))))
    found = [samples[i] for i in range(len(samples))]
    names = ["text", 7, "film", "old film", "mixed-4", "mixed-5", "listed"]
    assert [s["id"] for s in found] == names
    assert {s["kind"] for s in found} == {"mixed"}
    media = ["frames" if "frames" in s else "image" if "image" in s else "" for s in found]
    assert media == ["", "image", "frames", "frames", "frames", "", "image"]
    assert found[4]["conversations"][0]["value"] == "<image>\nwhat is it?"
    assert found[3]["conversations"][0]["value"] == "what is it?\n<image>"
    encode = Encoder(build_tokenizer(), prompt_config("paper", "brief", 128), IMAGES)
    examples = [encode(sample) for sample in found]
    # 3 seconds at one frame a second; red in the middle of the padded square.
    assert [example.frames for example in examples] == [(), (1,), (3,), (3,), (3,), (), (1,)]
    assert examples[1].pixels[0, 0, 16, 16].tolist() == [255, 0, 0]


def test_videos_are_sampled_as_the_config_says_and_again_when_asked_again(tmp_path, pictures):
    path = write(tmp_path / "films.json", [MIXED[2]])
    for fps, most, count in ((1.0, 4, 3), (2.0, 99, 6), (2.0, 4, 4)):
        dataset = Dataset(path=path, images=str(pictures))
        frames = Samples(config_of(dataset, video=FrameSampling(fps=fps, max_frames=most)))[0][
            "frames"
        ]
        first, second = np.stack(list(frames)), np.stack(list(frames))
        assert len(first) == count and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)


def test_paths_are_relative_to_the_data_file_without_a_folder(tmp_path, pictures):
    path = write(pictures / "here.json", [MIXED[1]])
    assert Samples(config_of(path))[0]["image"] == str(pictures / "red.png")


# --- JSON Lines -----------------------------------------------------------------------------------


def test_lines_are_found_across_the_pieces_of_a_scan(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_mini_jax.data.sets.row_files._SCAN_BYTES", 37)
    lines = [json.dumps({"id": i, "conversations": turns("é" * i)}) for i in range(20)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n  \n" + lines[0] + "\r\n\n" + "\n".join(lines[1:]), "utf-8")  # no last end
    assert ids(path) == list(range(20))
    samples = Samples(config_of(path))
    assert samples[9]["conversations"][0]["value"] == "é" * 9
    assert [samples.parts[0].rows.place(row) for row in (0, 1, 19)] == [
        f"{path}, line {number}" for number in (3, 5, 23)
    ]


def test_a_line_is_parsed_when_it_is_read_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + '\n{"id": "b", \n' + json.dumps(rows(2)[1]) + "\n[]\n")
    samples = Samples(config_of(path))
    assert (samples[0]["id"], samples[2]["id"]) == ("s0", "s1")
    with pytest.raises(
        InputError, match=r"lines\.jsonl, line 2: not valid JSON \(.*; expected one sample"
    ):
        samples[1]
    with pytest.raises(InputError, match=r"lines\.jsonl, line 4 is \[\]; expected a sample"):
        samples[3]
    assert samples.id_of(1) == "lines-1"


# --- Parquet --------------------------------------------------------------------------------------


def write_parquet(path: Path, content, group: int) -> str:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(content), path, row_group_size=group)
    return str(path)


def hub_rows(picture: bytes):
    """Images as bytes, as paths, and absent, as the hub's "image" column has them."""
    images = [{"bytes": picture, "path": "a.png"}, {"bytes": None, "path": "red.png"}, None]
    marks = ["<image>\nwhat?", "<image>\nwhat?", "what?"]
    return [
        {"id": f"p{i}", "image": images[i % 3], "conversations": turns(marks[i % 3]), "other": 1.0}
        for i in range(9)
    ]


def test_parquet_rows_of_several_files(tmp_path, pictures):
    content = hub_rows((pictures / "red.png").read_bytes())
    folder = tmp_path / "hub"
    folder.mkdir()
    write_parquet(folder / "train-1.parquet", content[5:], 3)
    write_parquet(folder / "train-0.parquet", content[:5], 2)
    (folder / "README.md").write_text("about")
    samples = Samples(config_of(Dataset(path=str(folder), images=str(pictures))))
    order = np.random.default_rng(0).permutation(9)
    assert [samples[i]["id"] for i in order] == [f"p{i}" for i in order]
    assert samples[0]["image"] == (pictures / "red.png").read_bytes()
    assert samples[4]["image"] == str(pictures / "red.png")
    assert "image" not in samples[8] and samples[8]["conversations"] == turns("what?")
    places = [samples.parts[0].rows.place(row).rpartition("/")[2] for row in (0, 4, 5, 8)]
    assert places == [
        f"train-{file}.parquet, row {row}" for file, row in ((0, 1), (0, 5), (1, 1), (1, 4))
    ]


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match=r"Cannot read the Parquet file .*rows\.parquet: "):
        Samples(config_of(path))


# --- Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("all", range(7)),
        ("first:3", range(3)),
        ("first:100", range(7)),
        ("end:2", range(5, 7)),
        ("end:50%", range(3, 7)),  # 3.5 rounded up, as LLaVA-OneVision rounds
        ("first:1%", range(1)),
    ],
)
def test_sampling(tmp_path, sampling, expected):
    path = write(tmp_path / "rows.json", rows(7))
    assert ids(Dataset(path=path, sampling=sampling)) == [f"s{i}" for i in expected]


def test_random_sampling_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "rows.json", rows(100))
    half = Dataset(path=path, sampling="random:50%")
    chosen = ids(half, seed=3)
    assert chosen == ids(half, seed=3) and len(set(chosen)) == 50
    assert chosen != ids(half, seed=4) and chosen != [f"s{i}" for i in range(50)]
    other = write(tmp_path / "other.json", rows(5))
    assert ids(other, half, seed=3)[5:] == chosen  # whatever stands beside it
    twin = Dataset(path=write(tmp_path / "twin.json", rows(100)), sampling="random:50%")
    assert ids(twin, seed=3) != chosen  # not the same rows of every file


def test_weights_repeat_samples_and_draw_fractions(tmp_path):
    path = write(tmp_path / "rows.json", rows(10))
    everything = [f"s{i}" for i in range(10)]
    repeated = ids(Dataset(path=path, weight=2.5))
    assert repeated[:20] == everything * 2 and len(set(repeated[20:])) == 5
    assert len(set(ids(Dataset(path=path, weight=0.3)))) == 3
    with pytest.raises(InputError, match="leave none of its 10 samples"):
        ids(Dataset(path=path, weight=0.01))


def test_several_data_sets_follow_each_other_under_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "train.json", rows(2))
    second = write(tmp_path / "b" / "train.jsonl", rows(3))
    samples = Samples(config_of(first, Dataset(path=second, sampling="end:1"), first))
    kinds = [samples[i]["kind"] for i in range(len(samples))]
    assert kinds == ["train", "train", "train-2", "train-3", "train-3"]
    assert [samples[i]["id"] for i in range(5)] == ["s0", "s1", "s2", "s0", "s1"]
    for outside in (5, -1):
        with pytest.raises(IndexError, match=f"sample {outside} of 5"):
            samples[outside]


def test_batches_come_from_files(tmp_path, pictures):
    path = write(tmp_path / "mixed.jsonl", MIXED)
    stream = make_batches(
        Samples(config_of(Dataset(path=path, images=str(pictures)))),
        Encoder(build_tokenizer(), prompt_config("paper", "brief", 128), IMAGES),
        BatchLayout(
            tokens_per_image=1,
            buckets=Buckets(lengths=(64, 128), images=(1, 2, 4, 8, 16)),
            max_length=128,
            padding_side="right",
        ),
        batch_size=4,
        seed=0,
        first_step=0,
    )
    for batch in itertools.islice(stream, 3):
        assert batch.arrays.inputs.ids_BT.shape[0] == 4 and not batch.rejected


# --- Lists ----------------------------------------------------------------------------------------


def test_a_onevision_list(tmp_path):
    text = """
datasets:
  - json_path: a/one.json
    sampling_strategy: "first:10%"
  - json_path: /elsewhere/two.jsonl
    image_folder: coco
    weight: 2
"""
    (tmp_path / "mix.yaml").write_text(text)
    assert read_list(tmp_path / "mix.yaml", images="all") == (
        Dataset(path=str(tmp_path / "a/one.json"), images="all", sampling="first:10%"),
        Dataset(path="/elsewhere/two.jsonl", images=str(tmp_path / "coco"), weight=2.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", "not valid YAML"),
        ("!!int ''", "not valid YAML"),
        ("[]", 'no entries under "datasets"'),
        ("datasets: []", 'no entries under "datasets"'),
        ("datasets: [{sampling_strategy: all}]", "entry 1 is .*json_path"),
        ("datasets: [{json_path: a.json, samplng_strategy: all}]", "entry 1 is"),
        ("datasets: [{json_path: a.json}, a.json]", "entry 2 is 'a.json'"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'last:3'}]", "the sampling is"),
        ("datasets: [{json_path: a.json, weight: -1}]", "the weight is -1.0"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_list(path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
