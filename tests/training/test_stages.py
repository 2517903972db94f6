"""Stages: what they refuse, what they begin with, and what of it a training step changes."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest

from configs import digits
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.sets.packing import PackingConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.ops.rope import DynamicScaling, RopeConfig
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.optimizer import Group, make_optimizer
from llava_mini_jax.training.stages import (
    STAGE_1,
    STAGE_2,
    TrainConfig,
    bundle_of,
    check,
    load_config,
    rebuilt,
    stages_of,
)
from llava_mini_jax.training.step import init_state, train_step
from tests import tiny

fast_compilation = tiny.fast_compilation

VISION = dataclasses.replace(tiny.VISION, layers=2)
BASELINE = tiny.model("llava-1.5", vision=VISION)
MINI = tiny.model("paper", vision=VISION, prefusion_layers=1)
KEY = jax.random.key(0)


def stage(model=MINI, **changes) -> TrainConfig:
    """Stage 2 of the digits world with a tiny model."""
    changes = dict(model=model, scan_layers=True) | changes
    return dataclasses.replace(digits.config().stage2, **changes)


def arrays(params):
    """{path: numpy array}, as numbers that no later donation takes away."""
    leaves = param_tree.paths(params)
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [path for path in ours if not np.array_equal(ours[path], theirs[path])]
    assert not different, f"different: {different}"


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["*", "llm/*", "llm/layers/*", "llm/layers/q_proj", "compressor/query"]
)
def test_another_model_takes_patterns_of_any_depth(pattern):
    parent = stage(trainable=(pattern, "prefusion/*", "nothing/like/this"))
    found = rebuilt(parent, "paper", prefusion_layers=0, grid=1)
    assert found.model.prefusion_layers == 0
    assert found.trainable == (pattern,)  # what has no parameter any more is not trained


@pytest.mark.parametrize("name", ["copy.py", "numpy.py", "json.py"])
def test_a_config_file_may_have_any_name(tmp_path, name):
    """Its name was a module's for the whole process: `import copy` found the config file."""
    before = sys.modules.get(name.removesuffix(".py"))
    (tmp_path / name).write_text("from configs.digits import config\n")
    assert stages_of(load_config(str(tmp_path / name)))
    assert sys.modules.get(name.removesuffix(".py")) is before


def test_a_config_is_one_stage_or_several():
    one = digits.config().stage1
    assert stages_of(one) == [one]
    names = [stage.name for stage in stages_of(digits.config())]
    assert names == ["captions", "baseline", "stage1", "stage2"]
    with pytest.raises(InputError, match="TrainConfig, not dict"):
        stages_of({"stage": one})


def test_the_digits_stages_are_runnable():
    for one in stages_of(digits.config()):
        check(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(trainable=("projektor/*",)), r'stage2: the pattern "projektor/\*" matches no'),
        (dict(fresh=("compresor/*",)), r'"compresor/\*" matches no'),
        (
            dict(prefusion_init="zeros"),
            "prefusion_init is 'zeros'; expected fresh or copy or identity",
        ),
        (dict(steps=0), "steps is 0"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(log_every=0), "log_every is 0"),
        (dict(checkpoint_every=0), "checkpoint_every is 0"),
        (dict(param_dtype="float31"), "param_dtype is 'float31'; expected float32 or"),
        (dict(name="../stage2"), r"^\.\./stage2: a stage's name is that of its folder"),
        (dict(trainable=()), "trainable is empty; name what is to be learnt"),
        (dict(lengths=()), r"lengths is \(\); expected increasing sizes"),
        (dict(lengths=(256, 128)), r"lengths is \(256, 128\); expected increasing sizes"),
        (dict(lengths=(128,)), "lengths is 128, but rows may have prompt.max_length = 256 pos"),
        (dict(mesh=MeshConfig(data=0)), "mesh.data is 0; it must be 1 or more"),
        (dict(mesh=MeshConfig(data=3, fsdp=2)), "make it a multiple of 6, or change accumulate"),
        (dict(packing=PackingConfig(window=9)), "packing.window is 9 conversations, too few"),
        (dict(packing=PackingConfig(images=9)), "packing.images 9 changes nothing without packing"),
        (dict(packing=PackingConfig(window=-1)), "packing is window -1, images 0; each must be 0"),
        (dict(accumulate=5), "batch_size 64 cannot be divided into accumulate = 5 micro-batches"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_stage_that_cannot_run_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(digits.config().stage2, **change))


def test_nested_settings_are_checked_too():
    good = digits.config().stage2

    def optimizer(**changes):
        return dict(optimizer=dataclasses.replace(good.optimizer, **changes))

    def prompt(**changes):
        return dict(prompt=dataclasses.replace(good.prompt, **changes))

    groups = (Group(patterns=("llm/*", "nothing/*"), learning_rate=1.0),)
    wrong = {
        '"nothing/': optimizer(groups=groups),
        "max_grad_norm is -1.0; it must be 0": optimizer(max_grad_norm=-1.0),
        "warmup_ratio is 5.0; it is a share, from 0 to 1": optimizer(warmup_ratio=5.0),
        "beta1 is -0.1; it must be from 0 to below 1": optimizer(beta1=-0.1),
        "beta2 is 1; it must be from 0 to below 1": optimizer(beta2=1),
        "padding_side is 'lefft'; expected right or left": prompt(padding_side="lefft"),
        "prompt.max_length is 0; it must be 1 or more": prompt(max_length=0),
        "images.size is 333; expected": dict(images=dataclasses.replace(good.images, size=333)),
        "template is 'vicuna'": prompt(template="vicuna"),
        "compute_dtype": dict(model=dataclasses.replace(good.model, compute_dtype="half")),
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            check(dataclasses.replace(good, **change))


def test_dynamic_rotary_positions_have_an_end():
    """Behind the model's own positions they would depend on the length of the text."""
    good = digits.config().stage2
    rope = RopeConfig(theta=10000.0, scaling=DynamicScaling(factor=2.0))

    def long(rope: RopeConfig, most: int):
        llm = dataclasses.replace(good.model.llm, rope=rope, max_positions=most)
        return dataclasses.replace(good, model=dataclasses.replace(good.model, llm=llm))

    check(long(rope, 256))
    check(long(dataclasses.replace(rope, scaling=None), 255))
    with pytest.raises(InputError, match=r"prompt.max_length is 256, but .* beyond 255 positions"):
        check(long(rope, 255))


def test_no_clipping_and_no_warm_up_are_settings():
    good = digits.config().stage2
    off = dataclasses.replace(good.optimizer, max_grad_norm=0, warmup_ratio=0)
    check(dataclasses.replace(good, optimizer=off))


@pytest.mark.parametrize("name", ["run.py", "ablations/run.py"])
def test_a_config_file_finds_those_beside_it_wherever_it_is_started(tmp_path, monkeypatch, name):
    folder = tmp_path / "settings"
    (folder / "ablations").mkdir(parents=True)
    (folder / "base.py").write_text("WIDTH = 7\n")
    (folder / name).write_text(
        "from settings import base\n\ndef config():\n    return base.WIDTH\n"
    )
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    monkeypatch.delitem(sys.modules, "settings.base", raising=False)
    assert load_config(str(folder / name)) == 7
    assert sys.path == before


def test_an_export_says_what_the_stage_is():
    one = digits.config().stage2
    bundle = bundle_of(one, build_tokenizer())
    assert (bundle.model, bundle.images, bundle.prompt) == (one.model, one.images, one.prompt)
    assert (bundle.eos_ids, bundle.pad_id) == ((2,), 3)


# --- What training changes ------------------------------------------------------------------------


def train(model, trainable, unrolled=False, steps=3):
    """(parameters before, after, losses) of a few steps."""
    optimizer_cfg = dataclasses.replace(
        digits.config().stage2.optimizer,
        groups=(),
        # Adam divides a gradient by its own size. With a small eps that makes a step's worth of
        # rounding noise, where the true gradient is zero; this one keeps noise (1e-8) below 1e-3.
        eps=1e-5,
    )
    params = tiny.on_device(tiny.weights(model))
    params = llava_mini.unrolled(params) if unrolled else params
    before = arrays(params)
    selected, _ = param_tree.split(params, lambda path: param_tree.matches(path, trainable))
    optimizer = make_optimizer(optimizer_cfg, steps, selected)
    state = init_state(params, trainable, optimizer)
    assert_state_is_of(state, trainable)
    losses = []
    for _ in range(steps):
        state, metrics = train_step(
            state, tiny.on_device(tiny.training_batch(model)), cfg=model, optimizer=optimizer
        )
        losses.append(float(metrics["loss"]))
    assert int(state.step) == steps
    return before, param_tree.merge(state.trainable, state.frozen), losses


def assert_state_is_of(state, trainable):
    """Trainable and frozen parts share nothing, and Adam's averages exist for the first alone."""
    learnt = param_tree.paths(state.trainable)
    assert all(param_tree.matches(path, trainable) for path in learnt)
    still = param_tree.paths(state.frozen)
    assert still and not any(param_tree.matches(path, trainable) for path in still)
    averages = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(averages) == sorted(2 * [leaf.shape for leaf in learnt.values()])


@functools.cache
def stage_2():
    before, after, losses = train(MINI, STAGE_2)
    return before, arrays(after), llava_mini.unrolled(after), losses


def check_what_changed(before, after, trainable):
    for path in before:
        changed = not np.array_equal(before[path], after[path])
        assert changed == param_tree.matches(path, trainable), path


def test_stage_1_changes_every_parameter_of_the_projector_and_no_other_bit():
    before, after, losses = train(BASELINE, STAGE_1)
    check_what_changed(before, arrays(after), STAGE_1)
    assert losses[2] < losses[1] == losses[0]  # the first step of the warm-up has rate zero


def test_stage_2_changes_every_parameter_and_no_bit_of_the_tower():
    before, after, _, losses = stage_2()
    check_what_changed(before, after, STAGE_2)
    assert losses[2] < losses[1] == losses[0]


def test_the_same_steps_give_the_same_bits():
    _, after, losses = train(MINI, STAGE_2)
    assert_same(arrays(after), stage_2()[1])
    assert losses == stage_2()[3]


def test_scanned_and_unrolled_layers_learn_the_same():
    before, unrolled, losses = train(MINI, STAGE_2, unrolled=True)
    _, _, scanned, scanned_losses = stage_2()
    np.testing.assert_allclose(losses, scanned_losses, rtol=1e-5)  # float32 sums in another order
    ours, theirs = arrays(unrolled), arrays(scanned)
    assert max(np.abs(ours[path] - before[path]).max() for path in ours) > 2e-3
    for path in theirs:
        # A hundredth of what three steps at a rate of 2e-3 move a parameter.
        np.testing.assert_allclose(ours[path], theirs[path], atol=2e-5, rtol=0, err_msg=path)
