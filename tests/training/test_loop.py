"""The loop: what a run leaves behind, and that an interrupted run ends as an uninterrupted one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import loop
from llava_mini_jax.training.stages import MeshConfig
from llava_mini_jax.training.step import train_step
from llava_mini_jax.weights import folders
from tests import tiny
from tests.conftest import ROOT
from tests.training import tiny_stages
from tests.training.tiny_stages import STEPS

fast_compilation = tiny.fast_compilation

# Two more steps on another mesh: sums in another order, at a rate of 2e-3.
OTHER_MESH = 2e-5


class Final(NamedTuple):
    """What a stage leaves."""

    params: dict[str, np.ndarray]
    devices: set[int]  # how many devices a parameter lies on
    compiled: int  # programs of the training step


def run(stages, folder):
    """{stage: Final} of a run."""
    finals = {}

    def recorded(stage, *rest):
        before = train_step._cache_size()
        params = run_stage(stage, *rest)
        devices = {len(leaf.devices()) for leaf in jax.tree.leaves(params)}
        finals[stage.name] = Final(arrays(params), devices, train_step._cache_size() - before)
        return params

    run_stage = loop.run_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_stage", recorded)
        loop.run(stages, str(folder))
    return finals


def arrays(params):
    return {path: np.array(leaf) for path, leaf in param_tree.paths(params, is_leaf=None).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [path for path in ours if not np.array_equal(ours[path], theirs[path])]
    assert not different, f"different: {different}"


def metrics_of(folder):
    """{(stage, step): the last line about it, without times}."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = ("loss", "token_accuracy", "grad_norm")
    return {(line["stage"], line["step"]): [line[name] for name in kept] for line in lines}


def saved_steps(folder, stage):
    steps = (folder / "checkpoints" / stage).iterdir()
    return sorted(int(path.name) for path in steps if path.name.isdigit())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, parameters) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(tiny_stages.stages(), folder)


def copied(finished, folder, *removed):
    """A finished workdir without some of its files."""
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    for name in removed:
        shutil.rmtree(folder / name)
    return folder


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
        params = folders.load_params(bundle, published, dtype="float32", unrolled=True)
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


SETTINGS = (
    "jax_platforms",
    "jax_num_cpu_devices",
    "jax_disable_most_optimizations",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
# Dies in the last stage, while its fourth step is being saved.
KILLED_RUN = """
import os, signal, sys
from llava_mini_jax.training import loop
from llava_mini_jax.weights.checkpoint import Checkpoints
from tests.training import tiny_stages

def save_and_die(self, step, state, about):
    save(self, step, state, about)
    if (about["stage"], step) == ("stage2", 4):
        os.kill(os.getpid(), signal.SIGKILL)

save, Checkpoints.save = Checkpoints.save, save_and_die
loop.run(tiny_stages.stages(), sys.argv[1])
"""


def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2", "stage2")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder)],
        env=os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Step 4 was perhaps not written yet. Either way, no half of it may be taken for a whole.
    assert saved_steps(folder, "stage2") in ([2], [2, 4])
    half = folder / "checkpoints" / "stage2" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half of a file")
    assert not (folder / "stage2").exists()
    finals = run(tiny_stages.stages(), folder)
    assert finals["stage2"].compiled == 1
    assert metrics_of(folder) == metrics_of(finished[0])
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)
    assert saved_steps(folder, "stage2") == [6, 8]


def test_a_run_continues_on_another_mesh(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2/8", "stage2")
    mesh = MeshConfig(fsdp=2, tensor=2)
    *stages, stage2 = tiny_stages.stages()
    stages.append(dataclasses.replace(stage2, mesh=mesh))
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
        "captions: steps is 0": [dataclasses.replace(captions, steps=0)],
        "vocab_size is 50": [
            dataclasses.replace(captions, model=dataclasses.replace(captions.model, llm=small))
        ],
        "needs 64 devices, but 8 are visible": [
            dataclasses.replace(captions, mesh=MeshConfig(data=64))
        ],
        "no folder nothing": [dataclasses.replace(captions, tokenizer="nothing")],
    }
    for message, stages in wrong.items():
        with pytest.raises(InputError, match=message):
            loop.run(stages, str(tmp_path))


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


def test_a_damaged_checkpoint_is_named_and_the_run_continues_without_it(finished, tmp_path):
    folder = copied(finished, tmp_path, "stage2")
    newest = folder / "checkpoints" / "stage2" / "8"
    for file in (newest / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"stage2/8 cannot be restored .* remove its folder"):
        loop.run(tiny_stages.stages(), str(folder))
    shutil.rmtree(newest)
    finals = run(tiny_stages.stages(), folder)
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)
