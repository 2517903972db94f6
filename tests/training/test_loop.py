"""The loop: what a run leaves behind, and that an interrupted run ends as an uninterrupted one."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.digits import DigitsPages
from llava_mini_jax.data.sources import Dataset, SourcesConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import loop
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import MeshConfig, starting_params
from llava_mini_jax.training.step import init_state, train_step
from llava_mini_jax.weights import folders
from llava_mini_jax.weights.checkpoint import Checkpoints, fingerprints
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
    """{(stage, step): the line about it, without times}."""
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    kept = ("loss", "token_accuracy", "grad_norm")
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)
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
    """A finished workdir without some of its folders; what metrics.jsonl says stays."""
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
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "step": 6, "loss": 9.0}\n{"stage": "sta')
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


def test_a_run_whose_steps_are_all_skipped_stops(tmp_path):
    first = tiny_stages.stages()[0]
    hopeless = dataclasses.replace(first.optimizer, learning_rate=float("inf"))
    stage = dataclasses.replace(first, optimizer=hopeless, steps=8, max_skipped=2)
    with pytest.raises(InputError, match=r"captions: 3 steps in a row, seen at step 4, .*seed 0\)"):
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


def damage(folder, random):
    """One file of a checkpoint cut, changed in one bit, or removed: what was done, in words."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    file = random.choice(files)
    content = bytearray(file.read_bytes())
    kind = random.choice(("cut", "flipped", "removed"))
    if kind == "removed":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: random.randrange(len(content))])
    else:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
    return f"{kind} {file.relative_to(folder)}"


@pytest.fixture(scope="module")
def two_steps(finished, tmp_path_factory):
    """(folder of the last stage's checkpoints 6 and 8, a state like theirs, the state at 8)."""
    folder = finished[0] / "checkpoints" / "stage2"
    stage = tiny_stages.stages()[3]
    params = starting_params(stage, None, jax.random.key(0))
    trainable, _ = param_tree.split(params, lambda p: param_tree.matches(p, stage.trainable))
    optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
    like = init_state(params, stage.trainable, optimizer)
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.resume(like)
    assert step == 8
    return folder, like, fingerprints(state)


@pytest.mark.parametrize("case", range(30))
def test_a_damaged_checkpoint_is_never_loaded(two_steps, tmp_path, capsys, case):
    source, like, whole = two_steps
    folder = tmp_path / "stage2"
    shutil.copytree(source, folder)
    what = damage(folder / "8", random.Random(case))
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.resume(like)
    if step == 8:  # what was damaged says nothing about the arrays
        assert fingerprints(state) == whole, what
        return
    assert step == 6, what
    said = capsys.readouterr().err
    assert "stage2/8 is damaged" in said and "continuing from step 6" in said
    assert (folder / "damaged-8").is_dir()
    with Checkpoints(folder) as checkpoints:  # and it is out of the way from then on
        assert checkpoints.resume(like)[0] == 6
        checkpoints.save(8, like, {"stage": "stage2"})
    assert sorted(p.name for p in folder.iterdir() if p.name.isdigit()) == ["6", "8"]


def test_fingerprints_see_every_bit_and_no_mesh():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    (number,) = fingerprints([jax.numpy.asarray(values)]).values()
    changed = values.copy()
    changed.view(np.uint32)[2, 3] ^= 1
    swapped = values.copy()
    swapped[0, 1], swapped[1, 0] = values[1, 0], values[0, 1]
    for other in (changed, swapped, np.zeros_like(values)):
        assert list(fingerprints([jax.numpy.asarray(other)]).values()) != [number]
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        split = jax.device_put(values, jax.NamedSharding(jax.sharding.get_mesh(), P("fsdp")))
        assert list(fingerprints([split]).values()) == [number]
    for dtype in ("bfloat16", "int32", "bool", "float16"):
        assert fingerprints([jax.numpy.ones((3,), dtype)]) != fingerprints(
            [jax.numpy.zeros((3,), dtype)]
        )


def test_a_damaged_run_continues_from_the_step_before_to_the_same_bits(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "stage2")
    newest = folder / "checkpoints" / "stage2" / "8"
    for file in (newest / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finals = run(tiny_stages.stages(), folder)
    assert "continuing from step 6" in capsys.readouterr().err
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)


def test_sigterm_ends_a_run_with_a_checkpoint_and_status_0(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2", "stage2")
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED_RUN, str(folder)],
        env=os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "stage2 stopped at step 3 of 8" in stopped.stdout
    assert saved_steps(folder, "stage2") == [2, 3]
    finals = run(tiny_stages.stages(), folder)
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)


# Asks itself to stop while the third step of the last stage is computed.
STOPPED_RUN = """
import os, signal, sys
import train
from llava_mini_jax.training import loop, stages
from tests.training import tiny_stages

put_batch, last, batches = loop.sharding.put_batch, tiny_stages.stages()[-1], 0

def put_and_ask(batch):
    global batches
    batches += 1
    if batches == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return put_batch(batch)

loop.sharding.put_batch = put_and_ask
stages.load_config = lambda path: None
stages.stages_of = lambda config: tiny_stages.stages()
train.parse = lambda default, argv: (None, argv[1], False)
sys.exit(train.main(["config.py", sys.argv[1]]))
"""


def test_a_full_disk_ends_a_run_with_a_sentence_and_whole_checkpoints(finished, tmp_path):
    folder = copied(finished, tmp_path, "checkpoints/stage2", "stage2")
    refused = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)],
        env=os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Threads of the checkpoint's writer may say their own last words after it.
    said = [line for line in refused.stderr.splitlines() if "errors.InputError: " in line]
    assert said and "cannot be written" in said[-1] and "make room" in said[-1], refused.stderr
    assert saved_steps(folder, "stage2") == [2]
    finals = run(tiny_stages.stages(), folder)
    assert_same(finals["stage2"].params, finished[1]["stage2"].params)


# No file may grow beyond a few bytes once the first checkpoint of the last stage is written.
FULL_DISK = """
import resource, signal, sys
from llava_mini_jax.training import loop
from llava_mini_jax.weights.checkpoint import Checkpoints
from tests.training import tiny_stages

def save(self, step, state, about):
    if (about["stage"], step) == ("stage2", 4):
        self._manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    write(self, step, state, about)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, Checkpoints.save = Checkpoints.save, save
loop.run(tiny_stages.stages(), sys.argv[1])
"""


# One stage of 600 steps, saved every tenth, in a process of its own.
LONG_RUN = """
import dataclasses, sys
from llava_mini_jax.training import loop
from tests.training import tiny_stages

first = tiny_stages.stages()[0]
loop.run([dataclasses.replace(first, steps=600, checkpoint_every=10, log_every=10)], sys.argv[1])
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", LONG_RUN, str(folder)],
            env=os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait() == 0
    moments = random.Random(0)
    kills, reached = 0, set()
    for _ in range(20):
        running = start(tmp_path / "killed")
        try:
            running.wait(moments.uniform(1, 12))
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
        saved = tmp_path / "killed" / "checkpoints" / "captions"
        if saved.is_dir():
            reached |= {int(path.name) for path in saved.iterdir() if path.name.isdigit()}
    assert start(tmp_path / "killed").wait() == 0
    assert kills >= 10 and len(reached) > 4  # the moments lay in start-up, in steps and in saves
    whole, killed = (tmp_path / name / "captions" / "model" for name in ("whole", "killed"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in killed.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_a_stage_trains_on_data_sets(tmp_path):
    pages = tiny_stages.stages()[0]
    rows = []
    for index in range(16):
        item = DigitsPages(pages.data, 16)[index]
        Image.fromarray(item["image"]).save(tmp_path / f"{index}.png")  # every bit is kept
        rows.append({**item, "image": f"{index}.png"})
    (tmp_path / "pages.json").write_text(json.dumps(rows))
    files = Dataset(path=str(tmp_path / "pages.json"))
    data = SourcesConfig(datasets=(files,), fps=1.0, max_frames=8)
    same = dataclasses.replace(pages, samples=16)
    for name, stage in {"a": same, "b": dataclasses.replace(same, data=data)}.items():
        loop.run([stage], str(tmp_path / name))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
