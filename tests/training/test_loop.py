"""The loop: what a run leaves behind, how it is continued, and what it refuses."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, collate
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.data.digits.pages import DigitsPages, build_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import loop
from llava_mini_jax.training.loss import loss
from llava_mini_jax.training.optimizer import schedule
from llava_mini_jax.training.stages import HeldOut
from llava_mini_jax.training.xprof import ProfileConfig
from llava_mini_jax.weights import folders, import_hf
from tests import tiny
from tests.training import tiny_stages
from tests.training.runs import (
    arrays,
    assert_same,
    copied,
    metric_lines,
    metrics_of,
    run,
    saved_steps,
)
from tests.training.tiny_stages import STEPS

fast_compilation = tiny.fast_compilation

# Two more steps on another mesh: sums in another order, at a rate of 2e-3.
OTHER_MESH = 2e-5


def test_a_run_leaves_config_metrics_checkpoints_and_models(finished):
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert [stage["name"] for stage in config] == list(STEPS)
    assert config[3]["model"]["prefusion_layers"] == 1
    assert list(metrics_of(folder)) == [
        *(("captions", 2), ("baseline", 2), ("stage1", 2), ("stage1", 3)),
        *(("stage2", step) for step in (2, 4, 6, 8)),
    ]
    for name, steps in STEPS.items():
        assert saved_steps(folder, name) == (
            [2, 3] if steps == 3 else [6, 8] if steps == 8 else [2]
        )
    for line in metrics_of(folder).values():
        assert np.isfinite(line).all()


def test_a_stage_compiles_its_step_once(finished):
    assert {name: final.compiled for name, final in finished[1].items()} == dict.fromkeys(STEPS, 1)


def test_models_of_the_stages_have_the_final_parameters(finished):
    folder, finals = finished
    for stage in tiny_stages.stages():
        path = folder / stage.name / "model"
        bundle, published = folders.open_model(path, compute_dtype="float32")
        assert bundle.model == stage.model
        assert bundle.prompt == stage.prompt
        params = import_hf.load_params(bundle, published, dtype="float32", unrolled=True)
        assert_same(arrays(params), finals[stage.name].params)
        assert (path / "tokenizer.json").is_file()


def test_each_stage_begins_where_the_one_before_ended(finished):
    _, finals = finished
    before, stage1, stage2 = (finals[name].params for name in ("baseline", "stage1", "stage2"))
    for path in before:
        assert np.array_equal(before[path], stage1[path]) != path.startswith("projector/"), path
        kept = path.startswith("vision/")
        assert np.array_equal(stage1[path], stage2[path]) == kept, path
    assert stage2.keys() - before.keys() == {
        path for path in stage2 if path.startswith(("compressor/", "prefusion/"))
    }


def test_a_finished_workdir_is_left_as_it_is(finished):
    folder, finals = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run(tiny_stages.stages(), folder)
    for name in STEPS:
        assert_same(again[name].params, finals[name].params)
        assert again[name].compiled == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_is_continued_needs_no_start(finished, tmp_path, monkeypatch):
    start = tmp_path / "start"
    shutil.copytree(finished[0] / "baseline" / "model", start)
    stage = dataclasses.replace(tiny_stages.stages()[2], start=str(start))
    whole = run([stage], tmp_path / "run")["stage1"]
    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "stage1" / "3")
    shutil.rmtree(tmp_path / "run" / "stage1")
    monkeypatch.setattr(loop, "starting_params", None)
    continued = run([stage], tmp_path / "run")["stage1"]
    assert_same(continued.params, whole.params)
    assert continued.compiled == 1
    assert_same(run([stage], tmp_path / "run")["stage1"].params, whole.params)  # it has ended


def test_a_run_continues_on_another_mesh(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2/8", "stage2")
    mesh = MeshConfig(fsdp=2, tensor=2)
    *stages, stage2 = tiny_stages.stages()
    recomputing = dataclasses.replace(stage2.model, remat="full")  # changes no number either
    stages.append(dataclasses.replace(stage2, mesh=mesh, model=recomputing))
    finals = run(stages, folder)
    assert (finals["stage1"].devices, finals["stage2"].devices) == ({1}, {4})
    assert finals["stage2"].compiled == 1
    for path, leaf in finished[1]["stage2"].params.items():
        np.testing.assert_allclose(
            finals["stage2"].params[path], leaf, rtol=0, atol=OTHER_MESH, err_msg=path
        )
    np.testing.assert_allclose(
        metrics_of(folder)["stage2", 8], metrics_of(finished[0])["stage2", 8], rtol=1e-5
    )


# --- What is refused ------------------------------------------------------------------------------


def test_a_workdir_of_another_configuration_is_refused(finished):
    stages = tiny_stages.stages()
    stages[2] = dataclasses.replace(stages[2], steps=4)
    with pytest.raises(InputError, match=r"another configuration \(it differs in stage1.steps\)"):
        loop.run(stages, str(finished[0]))
    with pytest.raises(InputError, match=r"it differs in stage2.name, stage2.model"):
        loop.run(tiny_stages.stages()[:3], str(finished[0]))


def test_a_workdir_without_checkpoints_takes_a_corrected_configuration(tmp_path):
    captions, baseline, *_ = tiny_stages.stages()
    wrong = dataclasses.replace(captions, start=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere does not exist"):
        loop.run([wrong], str(tmp_path / "run"))
    with pytest.raises(InputError, match='start is "previous", but no stage comes before it'):
        loop.run([baseline], str(tmp_path / "run"))


def test_configurations_that_cannot_run_are_refused(tmp_path):
    captions = tiny_stages.stages()[0]
    small = dataclasses.replace(captions.model.llm, vocab_size=50)
    wrong = {
        "stages are named captions, captions": [captions, captions],
        "captions: a learning rate is inf": [
            dataclasses.replace(
                captions, optimizer=dataclasses.replace(captions.optimizer, learning_rate=math.inf)
            )
        ],
        "captions: steps is 0": [dataclasses.replace(captions, steps=0)],
        "vocab_size is 50": [
            dataclasses.replace(captions, model=dataclasses.replace(captions.model, llm=small))
        ],
        "needs 64 devices, but 8 are visible": [
            dataclasses.replace(captions, batch_size=64, mesh=MeshConfig(data=64))
        ],
        "no folder nothing": [dataclasses.replace(captions, tokenizer="nothing")],
    }
    for message, stages in wrong.items():
        with pytest.raises(InputError, match=message):
            loop.run(stages, str(tmp_path))


def test_a_run_whose_steps_are_all_skipped_stops(tmp_path):
    first = tiny_stages.stages()[0]
    hopeless = dataclasses.replace(first.optimizer, learning_rate=1e38)
    stage = dataclasses.replace(first, optimizer=hopeless, steps=8, max_skipped=2)
    with pytest.raises(InputError, match=r"captions: 2 steps in a row, seen at step 4, .*seed 0\)"):
        loop.run([stage], str(tmp_path))
    assert saved_steps(tmp_path, "captions") == [2]


def test_a_stage_begins_from_a_model_folder(finished):
    stage1 = dataclasses.replace(
        tiny_stages.stages()[2], start=str(finished[0] / "baseline" / "model")
    )
    begun = loop._start(stage1, None)
    assert begun is not None
    assert_same(arrays(begun), finished[1]["baseline"].params)


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/captions")
    shutil.copytree(folder / "checkpoints/stage2", folder / "checkpoints/captions")
    with pytest.raises(InputError, match=r"checkpoints/captions/8 cannot be restored"):
        loop.run(tiny_stages.stages(), str(folder))


def test_metrics_tell_speed_and_learning_rates_and_go_to_tensorboard(finished):
    folder, _ = finished
    last = metric_lines(folder)[-1]
    assert (last["stage"], last["step"]) == ("stage2", 8)
    assert last["learning_rate"] == pytest.approx(
        schedule(2e-3, warmup_ratio=0.1, steps=8)(7).item()
    )
    assert last["images_per_second"] == pytest.approx(last["examples_per_second"])
    assert last["tokens_per_second"] > last["examples_per_second"]  # one vision token and the text
    assert 0 <= last["data_wait_seconds"] < last["step_seconds"]
    assert last["model_tflops_per_second"] > 0 and "model_flop_utilisation" not in last  # a CPU
    (events,) = (folder / "tensorboard" / "stage2").iterdir()
    content = events.read_bytes()
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert f"training/{name}".encode() in content


def test_held_out_loss_is_that_of_the_same_data_every_time(tmp_path):
    first = tiny_stages.stages()[0]
    heldout = HeldOut(
        data=dataclasses.replace(first.data, split="heldout", samples=32), batches=4, every=1
    )
    stage = dataclasses.replace(first, heldout=heldout, steps=3)
    still = dataclasses.replace(stage.optimizer, learning_rate=1e-30)
    loop.run([dataclasses.replace(stage, optimizer=still)], str(tmp_path / "still"))
    learning = dataclasses.replace(stage, accumulate=2)  # evaluates in halves of a batch
    loop.run([learning], str(tmp_path / "learning"))
    lines = {
        name: [x for x in metric_lines(tmp_path / name) if "heldout_loss" in x]
        for name in ("still", "learning")
    }
    assert [x["step"] for x in lines["still"]] == [1, 2, 3]
    assert len({x["heldout_loss"] for x in lines["still"]}) == 1
    assert lines["learning"][2]["heldout_loss"] < lines["still"][0]["heldout_loss"]
    # The 32 samples, each once, whatever the order: worked out without the loop.
    params = run([dataclasses.replace(stage, optimizer=still)], tmp_path / "still")["captions"]
    expected = mean_loss(stage, params.params, DigitsPages(heldout.data, 32))
    np.testing.assert_allclose(lines["still"][2]["heldout_loss"], expected, rtol=1e-5)


def mean_loss(stage, arrays, pages):
    """Cross-entropy per supervised token of every page of a source."""
    spec = llava_mini.unrolled(llava_mini.spec(stage.model))
    params = param_tree.map_paths(lambda path, _: jnp.asarray(arrays[path]), spec)
    encode = Encoder(build_tokenizer(), stage.prompt, stage.images)
    layout = BatchLayout.of(
        stage.model,
        1,
        buckets=Buckets(lengths=stage.lengths, images=(1,)),
        padding_side="right",
        max_length=stage.prompt.max_length,
    )
    batch = collate([encode(pages[i]) for i in range(len(pages))], layout, truncate=False)
    return loss(params, jax.tree.map(jnp.asarray, batch), stage.model)[0]


def test_a_window_of_steps_is_recorded_for_xprof(tmp_path):
    stage = dataclasses.replace(tiny_stages.stages()[0], steps=5)
    loop.run([stage], str(tmp_path), ProfileConfig(steps="2:3"))
    (trace,) = (tmp_path / "profile" / "captions").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [e for plane in data.planes for line in plane.lines for e in line.events]
    numbers = [value for e in events for name, value in e.stats if name == "step_num"]
    assert sorted(set(numbers)) == [2, 3]


def test_checkpoints_of_chosen_steps_are_kept_for_ever(tmp_path):
    stage = dataclasses.replace(
        tiny_stages.stages()[0], steps=8, checkpoint_every=1, keep=2, keep_every=3
    )
    loop.run([stage], str(tmp_path))
    assert saved_steps(tmp_path, "captions") == [3, 6, 7, 8]


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(tmp_path, monkeypatch):
    """Else the device would wait at every logged step; a checkpoint has all lines up to its own."""
    events = []
    train_step, log, save = loop.train_step, loop.Metrics.log, loop.Checkpoints.save

    def stepped(*args, **named):
        events.append("step")
        return train_step(*args, **named)

    def logged(self, step, rates):
        events.append(f"log {step}")
        return log(self, step, rates)

    def saved(self, step, *rest):
        events.append(f"save {step}")
        return save(self, step, *rest)

    monkeypatch.setattr(loop, "train_step", stepped)
    monkeypatch.setattr(loop.Metrics, "log", logged)
    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    first = dataclasses.replace(
        tiny_stages.stages()[0], steps=4, log_every=1, checkpoint_every=3, heldout=None
    )
    loop.run([first], str(tmp_path))
    dispatched = ["step", "step", "log 1", "step", "log 2", "log 3", "save 3"]
    assert events == [*dispatched, "step", "log 4", "save 4"]
