"""What `data build` writes is what it read, bit for bit, or it is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.arrayrecord import Packed, PackedVideo, write_folder
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
from llava_mini_jax.data.sets.yaml_list import read_list
from llava_mini_jax.errors import InputError
from tests import tiny_model

IMAGES = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=32))
ENCODE = Encoder(build_tokenizer(), prompt_config("paper", "brief", 128), IMAGES)


def turns(question="<image>\nwhich digit?", answer="the digit is 3"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = [
    {"id": "photo", "image": "photo.jpg", "conversations": turns()},
    {"id": 7, "image": "page.png", "conversations": turns("é 数 <image>", "7" * 9)},
    {"id": "animation", "image": "animation.jpg", "conversations": turns()},
    {"id": "film", "video": "film.mp4", "conversations": turns()},
    {"q": "what is it?", "a": "3", "video_id": "film"},
    {"id": "pages", "video": "pages", "conversations": turns()},
    {"conversations": turns("hello")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    picture = Image.effect_noise((40, 30), 80)
    picture.convert("RGB").save(folder / "photo.jpg")
    picture.save(folder / "page.png")
    picture.save(folder / "a.gif", save_all=True, append_images=[picture.rotate(180)])
    (folder / "a.gif").rename(folder / "animation.jpg")
    (folder / "page.png").write_bytes((folder / "page.png").read_bytes() + b"\0\0")  # no fault
    tiny_model.write_video(folder / "film.mp4", seconds=3)
    (folder / "pages").mkdir()
    for number in (2, 10, 1):
        Image.new("L", (8, 8), 20 * number).save(folder / "pages" / f"{number}.png")
    (folder / "mixed.v1.json").write_text(json.dumps(ROWS))
    broken = [ROWS[0], {"id": "gone", "image": "gone.jpg", "conversations": turns()}, ROWS[6]]
    (folder / "broken.jsonl").write_text("\n".join([*map(json.dumps, broken), "{"]))
    return folder


def opened(path: Path, **changes) -> Samples:
    dataset = Dataset(path=str(path), **changes)
    return Samples(SourcesConfig(datasets=(dataset,), video=FrameSampling(fps=1.0, max_frames=4)))


def data(*words: object) -> int:
    return cli.main(["data", *map(str, words)])


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "mixed"
    assert data("build", folder / "mixed.v1.json", "--out", out, "--shards", 3) == 0
    return out


def assert_same(source: Samples, copy: Samples):
    assert len(source) == len(copy)
    for index in range(len(source)):
        mine, other = source[index], copy[index]
        assert type(mine["id"]) is type(other["id"])
        assert (mine["id"], mine["conversations"]) == (other["id"], other["conversations"])
        for one, two in zip(
            dataclasses.astuple(ENCODE(mine)), dataclasses.astuple(ENCODE(other)), strict=True
        ):
            np.testing.assert_array_equal(one, two)


def test_samples_are_those_of_the_source_bit_for_bit(folder, built):
    source, copy = opened(folder / "mixed.v1.json"), opened(built)
    assert_same(source, copy)
    assert copy[1]["image"] == (folder / "page.png").read_bytes()
    assert copy[0]["kind"] == copy.dataset_of(0) == "mixed"
    for ours, theirs in zip(copy.groups(), source.groups(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shards = [f"mixed_v1-train.array_record-0000{i}" for i in range(3)]
    files = ["dataset_info.json", "features.json", "groups.npy", *shards]
    assert sorted(p.name for p in built.iterdir()) == files
    assert opened(built, sampling="end:2")[0]["id"] == "pages"


def test_records_are_read_in_any_order_by_many_threads(built):
    samples = opened(built)
    order = np.random.default_rng(0).integers(0, len(ROWS), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: samples[i]["id"], order))
    assert found == [samples[i]["id"] for i in order]


def test_videos_are_sampled_as_the_reader_says(built):
    dataset = Dataset(path=str(built))
    samples = Samples(
        SourcesConfig(datasets=(dataset,), video=FrameSampling(fps=2.0, max_frames=99))
    )
    assert len(list(samples[3]["frames"])) == 6
    first, second = (np.stack(list(samples[3]["frames"])) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_built_folder_can_be_verified_and_built_again(built, tmp_path, capsys):
    manifest = tmp_path / "manifest.json"
    assert data("verify", built, "--report", manifest) == 0
    assert capsys.readouterr().out == "mixed: 3 image, 3 video, 1 text, 0 rejected\n"
    files = json.loads(manifest.read_text())["datasets"][0]["files"]
    assert [Path(f["path"]).name[-5:] for f in files] == ["00000", "00001", "00002"]
    assert data("build", built, "--out", tmp_path / "again", "--workers", 1) == 0
    assert_same(opened(built), opened(tmp_path / "again"))


def test_plain_tfds_reads_it_and_nothing_imports_tensorflow(built, tmp_path):
    code = """
import sys
import tensorflow_datasets as tfds
from llava_mini_jax import cli
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
built, out = sys.argv[1:]
assert cli.main(["data", "build", built, "--out", out]) == 0
samples = Samples(
    SourcesConfig(datasets=(Dataset(path=out),), video=FrameSampling(fps=1, max_frames=4))
)
rows = tfds.builder_from_directory(out).as_data_source(split="train")
assert len(rows) == len(samples) == 7
assert rows[0]["media"] == [samples[0]["image"]] and b'"photo"' in rows[0]["row"]
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, built, tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_list_keeps_its_weights_and_applies_its_sampling(folder, tmp_path, capsys):
    entries = [
        {"json_path": "mixed.v1.json", "sampling_strategy": "first:2", "weight": 2},
        {"json_path": "mixed.v1.json", "sampling_strategy": "random:50%"},
    ]
    (folder / "mix.yaml").write_text(json.dumps({"datasets": entries}))
    out = tmp_path / "out"
    assert data("build", folder / "mix.yaml", "--out", out) == 0
    assert f"use {out}/mixture.yaml as the data" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["mixed.v1", "mixed.v1-2", "mixture.yaml"]
    source, copy = (
        Samples(SourcesConfig(datasets=read_list(path), video=FrameSampling(fps=1.0, max_frames=4)))
        for path in (folder / "mix.yaml", out / "mixture.yaml")
    )
    assert_same(source, copy)
    assert len(copy) == 2 * 2 + 4
    assert [copy[i]["kind"] for i in (0, 7)] == [source[i]["kind"] for i in (0, 7)]


# --- Broken samples, broken builds ----------------------------------------------------------------


def test_a_broken_sample_stops_the_build(folder, tmp_path, capsys):
    assert data("build", folder / "broken.jsonl", "--out", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "'gone': Cannot open the image" in out and "'broken-3': " in out
    assert "2 samples are rejected, nothing was built" in out
    assert not any(tmp_path.iterdir())


def test_broken_samples_can_be_left_out_and_are_listed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert data("build", folder / "broken.jsonl", "--out", out, "--skip-rejected") == 0
    assert "broken: 2 samples" in capsys.readouterr().out
    copy = opened(out)
    assert [copy[i]["id"] for i in range(len(copy))] == ["photo", "broken-2"]
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["gone", "broken-3"]
    assert lines[1].keys() == {"id", "dataset", "place", "reason"}
    assert lines[1]["place"].endswith("broken.jsonl, line 4")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_build_does_not_pass_for_a_whole_one(folder, tmp_path):
    code = """
import os, sys
from llava_mini_jax import cli
from llava_mini_jax.data.sets import arrayrecord
arrayrecord.np.save = lambda *_: os._exit(9)  # all shards are written
cli.main(["data", "build", sys.argv[1], "--out", sys.argv[2]])
"""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, folder / "mixed.v1.json", out])
    assert done.returncode == 9 and not out.exists()
    (left,) = tmp_path.iterdir()
    assert (left / "dataset_info.json").exists()
    with pytest.raises(InputError, match="is not a complete data set of `llava-mini data build`"):
        opened(left)


def test_a_failed_build_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_mini_jax.data.sets.arrayrecord.np.save", full)
    assert data("build", folder / "mixed.v1.json", "--out", tmp_path / "out") == 1
    assert "No space left" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("*record-00001")).unlink(), "has 2 shards"),
        (lambda f: (f / "groups.npy").write_bytes(b"\x93NUMPY"), "is not a complete data set"),
        (lambda f: (f / "features.json").write_text("{}"), "is not a complete data set"),
        (lambda f: (f / "dataset_info.json").write_text("{"), "is not a complete data set"),
        (lambda f: np.save(f / "groups.npy", np.zeros((3, 2), np.int32)), "groups of 3"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(built, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        opened(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_shards_give_the_right_sample_or_one_sentence(built, tmp_path):
    """Cut anywhere and flipped anywhere; a hash of every record tells."""
    whole = opened(built)
    expected = [(whole[i]["id"], whole[i].get("image")) for i in range(len(whole))]
    shard = next(built.glob("*record-00000"))
    content = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    rng = np.random.default_rng(0)
    broken = 0
    for number in range(60):
        copy = tmp_path / str(number)
        shutil.copytree(built, copy)
        damaged = bytearray(content)
        place = int(rng.choice(used))
        if number % 2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(rng.integers(8))
        (copy / shard.name).write_bytes(damaged)
        samples = opened(copy)
        for index in range(len(samples)):
            try:
                found = samples[index]
            except InputError as error:
                broken += 1
                assert f"{copy}, sample {index + 1}: " in str(error) and "\n" not in str(error)
                assert samples.id_of(index) == f"{number}-{index}"
            else:
                assert (found["id"], found.get("image")) == expected[index]
        shutil.rmtree(copy)
    assert broken >= 60


def test_names_inside_of_a_data_set_stay_in_their_folder(tmp_path):
    film = PackedVideo(("../escaped.mp4",), (b"x",), False)
    (tmp_path / "set").mkdir()
    write_folder(tmp_path / "set", "set", [Packed("a", turns(), film, (1, 2))], 10)
    with pytest.raises(InputError, match="its files are"):
        opened(tmp_path / "set")[0]


def test_a_fault_in_a_packed_video_names_the_sample_and_not_a_temporary_file(tmp_path):
    film = PackedVideo(("film.mp4",), (b"\0" * 5000,), False)
    (tmp_path / "set").mkdir()
    write_folder(tmp_path / "set", "set", [Packed("a", turns(), film, (1, 2))], 10)
    with pytest.raises(InputError) as caught:
        list(opened(tmp_path / "set")[0]["frames"])
    assert f"Cannot read the video {tmp_path / 'set'}, sample 1/film.mp4" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "{good}"], "needs --out DIR"),
        (["build", "{good}", "--out", "{here}"], "exists already"),
        (["build", "{good}", "--out", "nowhere/x"], "has no parent folder"),
        (["build", "{good}", "--out", "{here}/x", "--shards", "0"], "0 shards"),
        (["build", "{good}", "--out", "{here}/x", "--report", "x"], "arguments: --report x"),
        (["verify", "{good}", "--out", "{here}/x"], "see: llava-mini data verify"),
        (["speed", "{good}"], "measures a training config"),
        (["speed", "configs/digits.py", "--threads", "0", "--batches", "1"], "0 threads"),
        (["polish", "{good}"], "expected verify, build, speed, packing after llava-mini data"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, words, message):
    names = dict(good=folder / "mixed.v1.json", here=tmp_path)
    assert data(*(word.format(**names) for word in words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert not any(tmp_path.iterdir())


# --- data speed -----------------------------------------------------------------------------------


def test_speed_of_a_training_config_is_a_table(tmp_path, capsys):
    code = """
import dataclasses
from configs import digits
from llava_mini_jax.training.stages import stages_of

def config():
    return dataclasses.replace(stages_of(digits.config())[0], name="pages", batch_size=4)
"""
    (tmp_path / "config.py").write_text(code)
    assert data("speed", tmp_path / "config.py", "--batches", 3, "--threads", 1, 2) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["stage", "threads", "samples/s"]
    table = [line.split() for line in lines]
    assert [row[:2] for row in table] == [["pages", "1"], ["pages", "2"]]
    for _, _, samples, seconds, core in table:
        assert float(samples) * float(seconds) == pytest.approx(4, rel=0.2)
        assert float(core) > 0


def test_builds_of_the_same_data_are_the_same_bytes(folder, tmp_path):
    """In processes of their own: what is random in one is drawn when it starts."""
    built = []
    for number in range(4):
        out = tmp_path / str(number) / "built"
        out.parent.mkdir()
        words = [
            "data",
            "build",
            str(folder / "mixed.v1.json"),
            "--out",
            str(out),
            "--workers",
            "4",
        ]
        script = f"from llava_mini_jax import cli; raise SystemExit(cli.main({words!r}))"
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        built.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert len(built[0]) > 3 and all(one == built[0] for one in built)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("home", "name"),
    [
        (np, "save"),
        (Path, "write_text"),
        (Path, "chmod"),
        (Path, "rename"),
        (shutil, "rmtree"),
        (json, "loads"),
    ],
)
def test_an_interrupt_in_the_last_moment_leaves_a_whole_folder_or_none(
    home, name, after, folder, tmp_path, monkeypatch
):
    source = folder / "mixed.v1.json"
    original, interrupts = getattr(home, name), []

    def interrupted(*given, **named):
        if str(tmp_path) not in str(given) and home is not json:
            return original(*given, **named)
        if after:
            original(*given, **named)
        interrupts.append(name)
        raise KeyboardInterrupt

    whole = tmp_path / "whole"
    assert data("build", source, "--out", whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(home, name, interrupted)
        status = data("build", source, "--out", tmp_path / "out")
    assert interrupts and status == 130
    if (tmp_path / "out").exists():
        assert_same(opened(whole), opened(tmp_path / "out"))
    if name != "rmtree":
        assert {p.name for p in tmp_path.iterdir()} <= {"whole", "out"}
