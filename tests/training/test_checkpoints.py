"""Checkpoints: damaged ones are never loaded, and fingerprints see every bit."""

import random
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.training.checkpoint import Checkpoints, fingerprints
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.start import starting_params
from llava_mini_jax.training.step import init_state
from tests import tiny
from tests.training import tiny_stages
from tests.training.runs import output, program

fast_compilation = tiny.fast_compilation


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
        step, state, about = checkpoints.resume(like)
    assert (step, about["stage"], about["samples"]) == (8, "stage2", stage.data.samples)
    return folder, like, fingerprints(state)


@pytest.mark.parametrize("case", range(30))
def test_a_damaged_checkpoint_is_never_loaded(two_steps, tmp_path, capsys, case):
    source, like, whole = two_steps
    folder = tmp_path / "stage2"
    shutil.copytree(source, folder)
    what = damage(folder / "8", random.Random(case))
    with Checkpoints(folder) as checkpoints:
        step, state, _ = checkpoints.resume(like)
    if step == 8:  # what was damaged says nothing about the arrays
        assert fingerprints(state) == whole, what
        return
    assert step == 6, what
    said = capsys.readouterr().err
    assert "stage2/8 is damaged" in said and "continuing from step 6" in said
    assert (folder / "damaged-8").is_dir()
    with Checkpoints(folder) as checkpoints:  # and it is out of the way from then on
        assert checkpoints.resume(like).step == 6
        checkpoints.save(8, like, {"stage": "stage2"})
    assert sorted(p.name for p in folder.iterdir() if p.name.isdigit()) == ["6", "8"]


def test_a_checkpoint_that_is_not_taken_is_told(tmp_path):
    """Two runs in one workdir: the other one was further."""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.resume({}) == (0, None, {})
        checkpoints.save(2, {"a": jax.numpy.zeros(2)}, {})
        with pytest.raises(
            InputError, match=r"step 1 was not written, because .* has one of step 2"
        ):
            checkpoints.save(1, {"a": jax.numpy.zeros(2)}, {})


# The disk is full when the second checkpoint is written, and a stage ends with or without an error.
FULL_DISK = """
import os, resource, signal, sys
import jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.training.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for error in (None, InputError("the stage's own")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    state = {"a": jax.numpy.ones((200, 200))}
    try:
        with Checkpoints(os.path.join(sys.argv[1], str(error))) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints._manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            checkpoints.save(2, state, {})
            if error:
                raise error
    except BaseException as raised:
        print(type(raised).__name__, raised)
sys.stdout.flush()
os._exit(0)  # the failed writer's threads never end
"""


def test_a_save_that_fails_at_the_end_is_told_but_not_instead_of_the_stages_error(tmp_path):
    status, out, err = output(program(FULL_DISK, tmp_path))
    without, own = out.splitlines()
    assert status == 0, err
    assert without.startswith("InputError a checkpoint in ") and "cannot be written (" in without
    assert own == "InputError the stage's own"


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
