"""The folder of a run: what kills leave of it is written anew."""

import dataclasses
import json

import pytest
from etils import epath

from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.packing import PackingConfig
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import run_inputs, workdir
from tests.data.toy_tokenizers import make_byte_level
from tests.training import tiny_stages


def test_half_a_config_that_a_kill_left_is_written_anew(tmp_path):
    (tmp_path / "config.json").write_text('[{"name": "capt')
    stages = tiny_stages.stages()
    workdir.open_workdir(str(tmp_path), stages)
    assert workdir.changed_fields(epath.Path(tmp_path), stages) == []


def test_a_run_says_where_it_leaves_things(tmp_path):
    lines = workdir.places(epath.Path(tmp_path))
    assert [line.split()[0] for line in lines] == ["metrics", "board", "checkpoints", "models"]
    assert f"{tmp_path}/metrics.jsonl" in lines[0]
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in lines[1]
    assert f"{tmp_path}/checkpoints/STAGE/STEP" in lines[2] and f"{tmp_path}/STAGE/" in lines[3]


def test_a_run_begun_before_prompts_had_a_date_goes_on(tmp_path):
    stages = tiny_stages.stages()
    workdir.open_workdir(str(tmp_path), stages)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    for stage in before:
        del stage["prompt"]["date"]
    path.write_text(json.dumps(before))
    assert workdir.changed_fields(epath.Path(tmp_path), stages) == []
    before[0]["prompt"]["date"] = "2024-07-26"
    path.write_text(json.dumps(before))
    assert workdir.changed_fields(epath.Path(tmp_path), stages) == [f"{stages[0].name}.prompt"]


def test_a_run_begun_before_a_field_of_a_stage_was_there_goes_on(tmp_path):
    """It means what its default does now, and another value is another run."""
    stages = tiny_stages.stages()
    workdir.open_workdir(str(tmp_path), stages)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    for stage in before:
        for name in ("lora", "draw_tokens", "packing"):
            del stage[name]
    path.write_text(json.dumps(before))
    assert workdir.changed_fields(epath.Path(tmp_path), stages) == []
    packed = dataclasses.replace(stages[0], packing=PackingConfig(window=64, images=1))
    found = workdir.changed_fields(epath.Path(tmp_path), [packed, *stages[1:]])
    assert found == [f"{stages[0].name}.packing"]


def test_a_run_begun_when_the_digits_world_had_one_wording_goes_on(tmp_path):
    stages = tiny_stages.stages()
    workdir.open_workdir(str(tmp_path), stages)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    for stage in before:
        del stage["data"]["wording"]
    path.write_text(json.dumps(before))
    assert workdir.changed_fields(epath.Path(tmp_path), stages) == []
    words = dataclasses.replace(stages[1].data, wording="english")
    other = dataclasses.replace(stages[1], data=words)
    found = workdir.changed_fields(epath.Path(tmp_path), [stages[0], other, *stages[2:]])
    assert found == [f"{other.name}.data"]


def test_a_run_begun_when_samples_stood_beside_the_data_goes_on(tmp_path):
    stage = tiny_stages.stages()[0]
    video = FrameSampling(fps=1.0, max_frames=8)
    files = SourcesConfig(datasets=(Dataset(path="rows.json"),), video=video)
    for data in (stage.data, files):
        folder = tmp_path / type(data).__name__
        stages = [dataclasses.replace(stage, data=data)]
        workdir.open_workdir(str(folder), stages)
        before = json.loads((folder / "config.json").read_text())
        before[0]["samples"] = before[0]["data"].pop("samples", 123)
        if video := before[0]["data"].pop("video", None):
            before[0]["data"] |= {name: video[name] for name in ("fps", "max_frames")}
        (folder / "config.json").write_text(json.dumps(before))
        assert workdir.changed_fields(epath.Path(folder), stages) == []
        changed = {"samples": 7} if data is stage.data else {"video": FrameSampling(fps=2)}
        stages = [dataclasses.replace(stage, data=dataclasses.replace(data, **changed))]
        assert workdir.changed_fields(epath.Path(folder), stages) == [f"{stage.name}.data"]


class Bucket:
    """A folder that says that it is in a bucket."""

    def __init__(self, folder):
        self._folder = folder

    def __str__(self):
        return f"gs://{self._folder}"

    def __truediv__(self, name):
        return self._folder / name

    def exists(self):
        return self._folder.exists()


def test_a_model_of_which_a_kill_left_half_in_a_bucket_is_copied_again(tmp_path, monkeypatch):
    def export(params, bundle, folder, tokenizer):
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("whole")

    monkeypatch.setattr(workdir, "export_model", export)
    (tmp_path / "model.safetensors").write_text("half")
    workdir.leave_model(None, None, Bucket(tmp_path), None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "tokenizer.json"), "whole"
    )
    monkeypatch.setattr(workdir, "export_model", None)
    workdir.leave_model(None, None, Bucket(tmp_path), None)  # what is whole is left as it is


def test_a_run_has_one_day(tmp_path, monkeypatch):
    """Chat templates ask for it; a run that goes on tomorrow trains on the same prompts."""
    tokenizer = make_byte_level()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    (stage, *_) = tiny_stages.stages()
    for day in ("2026-02-03", "2026-02-04"):
        monkeypatch.setattr(workdir, "today", lambda day=day: day)
        found = run_inputs.dated(stage, tokenizer, epath.Path(tmp_path))
        assert found.prompt.date == "2026-02-03" and stage.prompt.date == ""
    own = dataclasses.replace(stage, prompt=dataclasses.replace(stage.prompt, date="2024-07-26"))
    assert run_inputs.dated(own, tokenizer, epath.Path(tmp_path)) is own
    tokenizer.chat_template = None
    assert run_inputs.dated(stage, tokenizer, epath.Path(tmp_path)) is stage


def test_a_template_without_labels_ends_the_run_at_once():
    tokenizer = make_byte_level()
    (stage, *_) = tiny_stages.stages()
    run_inputs.check_template(stage, tokenizer)
    chat = dataclasses.replace(stage, prompt=dataclasses.replace(stage.prompt, template="chat"))
    for text, reason in ((None, "the tokenizer has none"), ("{{ 1 }}", "leaves messages out")):
        tokenizer.chat_template = text
        with pytest.raises(InputError, match=f"^{stage.name}: .*{reason}"):
            run_inputs.check_template(chat, tokenizer)
