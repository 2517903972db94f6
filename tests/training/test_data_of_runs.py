"""Runs on data sets: with broken samples, and when the data is not what it was before."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import prompt_config
from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import loop, run_inputs
from tests import tiny
from tests.data.test_quarantine import REJECTED, samples  # noqa: F401  a fixture
from tests.training import tiny_stages
from tests.training.runs import metrics_of

fast_compilation = tiny.fast_compilation


def test_a_stage_trains_on_data_sets(tmp_path):
    pages = tiny_stages.stages()[0]
    rows = []
    for index in range(16):
        item = DigitsPages(pages.data, 16)[index]
        Image.fromarray(item["image"]).save(tmp_path / f"{index}.png")  # every bit is kept
        rows.append({**item, "image": f"{index}.png"})
    (tmp_path / "pages.json").write_text(json.dumps(rows))
    files = Dataset(path=str(tmp_path / "pages.json"))
    data = SourcesConfig(datasets=(files,), video=FrameSampling(fps=1.0, max_frames=8))
    same = dataclasses.replace(pages, data=dataclasses.replace(pages.data, samples=16))
    for name, stage in {"a": same, "b": dataclasses.replace(same, data=data)}.items():
        loop.run([stage], str(tmp_path / name))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


def packed(path, pages, answers="digit"):
    """Sixteen pages as a WebDataset shard, with another word in the place of "digit"."""
    with tarfile.open(path, "w") as tar:
        for index in range(16):
            item = DigitsPages(pages.data, 16)[index]
            content = io.BytesIO()
            Image.fromarray(item.pop("image")).save(content, "PNG")
            row = json.dumps(item).replace("digit", answers).encode()
            for name, data in ((f"{index}.png", content.getvalue()), (f"{index}.json", row)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_stage_trains_on_shards_and_goes_on_with_these_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pages = tiny_stages.stages()[0]
    packed(tmp_path / "pages-000.tar", pages)
    files = Dataset(path=str(tmp_path / "pages-{000..000}.tar"))
    data = SourcesConfig(datasets=(files,), video=FrameSampling(fps=1.0, max_frames=8))
    same = dataclasses.replace(pages, data=dataclasses.replace(pages.data, samples=16), steps=4)
    stage = dataclasses.replace(same, data=data)
    loop.run([same], str(tmp_path / "drawn"))
    loop.run([stage], str(tmp_path / "run"))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "drawn")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "captions" / "4")
    shutil.rmtree(tmp_path / "run" / "captions")
    packed(tmp_path / "pages-000.tar", pages, "digIt")
    with pytest.raises(InputError, match=r"pages-000\.tar has other content of the same size"):
        loop.run([stage], str(tmp_path / "run"))
    packed(tmp_path / "pages-000.tar", pages)
    loop.run([stage], str(tmp_path / "run"))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "drawn")


def test_a_run_does_not_continue_with_another_number_of_samples(tmp_path, capsys):
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "7"}]
    rows = [{"id": str(index), "conversations": turns} for index in range(50)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    data = SourcesConfig(
        datasets=(Dataset(path=str(path)),), video=FrameSampling(fps=1.0, max_frames=8)
    )
    stage = dataclasses.replace(tiny_stages.stages()[0], data=data, steps=4)
    folder = tmp_path / "run"
    loop.run([stage], str(folder))
    said = capsys.readouterr().err
    assert "captions: process 0 of 1, 8 of 8 devices, mesh data=1 fsdp=1 tensor=1, cont" in said
    assert "from step 0; 50 samples, 4 steps x 8 = 0.64 epochs; attention xla (" in said
    shutil.rmtree(folder / "checkpoints" / "captions" / "4")
    shutil.rmtree(folder / "captions")
    path.write_text(json.dumps(rows[:37]))
    with pytest.raises(
        InputError, match=r"captions: its data has 37 samples, but had 50 when .*/2 "
    ):
        loop.run([stage], str(folder))
    with pytest.raises(InputError, match="accept this data with --accept-changed-data"):
        loop.run([stage], str(folder))


def test_broken_samples_are_listed_alike_by_a_run_that_was_interrupted(tmp_path):
    """R6: one in fifty is broken; a raised budget lets the run end, the usual one ends it."""
    pages = tiny_stages.stages()[0]
    rows = []
    for index in range(100):
        item = DigitsPages(pages.data, 100)[index]
        Image.fromarray(item["image"]).save(tmp_path / f"{index}.png")
        rows.append({**item, "image": f"{index}.png"})
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:100])
    (tmp_path / "9.png").unlink()
    (tmp_path / "pages.json").write_text(json.dumps(rows))
    files = Dataset(path=str(tmp_path / "pages.json"))
    data = SourcesConfig(datasets=(files,), video=FrameSampling(fps=1.0, max_frames=8))
    stage = dataclasses.replace(pages, data=data, steps=14, bad_samples=0.02, keep=9)
    loop.run([stage], str(tmp_path / "whole"))
    listed = (tmp_path / "whole" / "quarantine.jsonl").read_text()
    assert sorted(json.loads(line)["id"] for line in listed.splitlines()) == [
        rows[7]["id"], rows[9]["id"],
    ]  # fmt: skip

    shutil.copytree(tmp_path / "whole", tmp_path / "continued")
    for step in range(4, 15, 2):
        shutil.rmtree(tmp_path / "continued" / "checkpoints" / "captions" / str(step))
    shutil.rmtree(tmp_path / "continued" / "captions")
    loop.run([stage], str(tmp_path / "continued"))
    assert (tmp_path / "continued" / "quarantine.jsonl").read_text() == listed
    assert metrics_of(tmp_path / "continued") == metrics_of(tmp_path / "whole")

    with pytest.raises(InputError, match="captions: 1 of 100 samples are broken"):
        loop.run([dataclasses.replace(stage, bad_samples=0.001)], str(tmp_path / "strict"))


def test_a_run_over_broken_samples_of_ten_kinds_ends_and_lists_them(samples, tmp_path):  # noqa: F811
    """R6: one sample in a hundred; all of an epoch, within a budget of one in a hundred."""
    first = tiny_stages.stages()[0]
    stage = dataclasses.replace(
        first,
        data=samples.config,
        prompt=prompt_config("paper", "brief", 64),
        lengths=(64,),
        batch_size=50,
        steps=20,
        bad_samples=0.01,
        checkpoint_every=20,
    )
    loop.run([stage], str(tmp_path))
    found = list(map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines()))
    assert sorted(line["id"] for line in found) == sorted(REJECTED)
    assert all(REJECTED[line["id"]] in line["reason"] for line in found)
    assert all(np.isfinite(line).all() for line in metrics_of(tmp_path).values())
    assert (tmp_path / "captions" / "model" / "model.safetensors").is_file()


def stopped_run(tmp_path):
    """(stage, its data file, the folder of a run that is at step 2 of 4)."""
    pages = tiny_stages.stages()[0]
    rows = []
    for index in range(16):
        item = DigitsPages(pages.data, 16)[index]
        Image.fromarray(item["image"]).save(tmp_path / f"{index}.png")
        rows.append({**item, "image": f"{index}.png"})
    path = tmp_path / "pages.json"
    path.write_text(json.dumps(rows))
    data = SourcesConfig(
        datasets=(Dataset(path=str(path)),), video=FrameSampling(fps=1.0, max_frames=8)
    )
    stage = dataclasses.replace(pages, data=data, steps=4)
    folder = tmp_path / "run"
    loop.run([stage], str(folder))
    shutil.rmtree(folder / "checkpoints" / "captions" / "4")
    shutil.rmtree(folder / "captions")
    return stage, path, folder


def test_a_run_does_not_continue_on_other_data_unless_told_to(tmp_path, capsys):
    stage, path, folder = stopped_run(tmp_path)
    path.write_text(path.read_text().replace("digit", "digIt"))  # as many rows, as many bytes
    with pytest.raises(InputError) as refused:
        loop.run([stage], str(folder))
    told = str(refused.value)
    assert "captions: pages.json has other content of the same size when " in told
    assert "--accept-changed-data" in told and "\n" not in told
    loop.run([stage], str(folder), accept_changed_data=True)
    assert "captions: accepted changed data: pages.json has other" in capsys.readouterr().err
    shutil.rmtree(folder / "captions")
    loop.run([stage], str(folder))  # what was accepted is what the run has learnt from since


def test_a_run_goes_on_with_another_data_file_only_if_told_to(tmp_path):
    stage, path, folder = stopped_run(tmp_path)
    path.rename(tmp_path / "other.json")
    datasets = (Dataset(path=str(tmp_path / "other.json")),)
    other = dataclasses.replace(stage, data=dataclasses.replace(stage.data, datasets=datasets))
    with pytest.raises(InputError, match=r"differs in captions\.data\).*--accept-changed-data"):
        loop.run([other], str(folder))
    loop.run([other], str(folder), accept_changed_data=True)
    slower = dataclasses.replace(other, seed=5)
    with pytest.raises(InputError, match=r"differs in captions\.seed\)"):
        loop.run([slower], str(folder), accept_changed_data=True)


def test_checkpoints_that_do_not_say_their_data_are_continued_with_a_line(capsys):
    stage = tiny_stages.stages()[0]
    now = {"pages": {"samples": 7, "files": {}, "pictures": {}}}
    run_inputs.check_data(stage, now, {"samples": 7}, "checkpoints/captions/2")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("captions: checkpoints/captions/2 does not say what it was trained on;")
    run_inputs.check_data(stage, now, {}, "checkpoints/captions/0")  # a run that begins
    assert not capsys.readouterr().err
