"""Stages: what they refuse, what they begin with, and what of it a training step changes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import digits
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.digits import build_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training.optimizer import Group, make_optimizer
from llava_mini_jax.training.stages import (
    STAGE_1,
    STAGE_2,
    TrainConfig,
    bundle_of,
    check,
    stages_of,
    starting_params,
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
    leaves = param_tree.paths(params, is_leaf=None)
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [path for path in ours if not np.array_equal(ours[path], theirs[path])]
    assert not different, f"different: {different}"


# --- Configurations -------------------------------------------------------------------------------


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
        (dict(prefusion_init="zeros"), "prefusion_init is 'zeros'; expected fresh or copy"),
        (dict(steps=0), "steps is 0"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(log_every=0), "log_every is 0"),
        (dict(checkpoint_every=0), "checkpoint_every is 0"),
        (dict(param_dtype="float31"), "param_dtype is 'float31'; expected float32 or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_stage_that_cannot_run_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(digits.config().stage2, **change))


def test_nested_settings_are_checked_too():
    good = digits.config().stage2
    groups = (Group(patterns=("llm/*", "nothing/*"), learning_rate=1.0),)
    wrong = {
        '"nothing/': dict(optimizer=dataclasses.replace(good.optimizer, groups=groups)),
        "images.size is 333; expected": dict(images=dataclasses.replace(good.images, size=333)),
        "template is 'vicuna'": dict(prompt=dataclasses.replace(good.prompt, template="vicuna")),
        "compute_dtype": dict(model=dataclasses.replace(good.model, compute_dtype="half")),
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            check(dataclasses.replace(good, **change))


def test_an_export_says_what_the_stage_is():
    one = digits.config().stage2
    bundle = bundle_of(one, build_tokenizer())
    assert (bundle.model, bundle.images, bundle.prompt) == (one.model, one.images, one.prompt)
    assert (bundle.eos_ids, bundle.pad_id) == ((2,), 3)


# --- The beginning of a stage ---------------------------------------------------------------------


@functools.cache
def previous(model=BASELINE, unrolled=False):
    """What the stage before left."""
    params = tiny.on_device(tiny.weights(model))
    return llava_mini.unrolled(params) if unrolled else params


def test_parameters_are_carried_over_and_new_ones_are_made():
    one = stage(prefusion_init="fresh")
    begun, before = arrays(starting_params(one, previous(), KEY)), arrays(previous())
    assert_same({path: begun[path] for path in before}, before)
    new = {path: leaf.shape for path, leaf in begun.items() if path not in before}
    spec = param_tree.paths(llava_mini.spec(MINI))
    assert new == {
        path: leaf.shape
        for path, leaf in spec.items()
        if path.startswith(("compressor/", "prefusion/"))
    }
    assert not np.array_equal(begun["prefusion/layers/q_proj"], begun["llm/layers/q_proj"])


def test_fresh_parameters_are_made_anew_and_no_others():
    one = stage(BASELINE, fresh=STAGE_1)
    begun, again, other = (
        arrays(starting_params(one, previous(), jax.random.key(seed))) for seed in (0, 0, 1)
    )
    before = arrays(previous())
    for path in before:
        is_fresh = path.startswith("projector/")
        assert np.array_equal(begun[path], before[path]) != is_fresh, path
        assert np.array_equal(begun[path], other[path]) != is_fresh, path
    assert_same(begun, again)


@pytest.mark.parametrize(
    ("layers", "scan_layers"),
    [(1, True), (2, True), (1, False)],  # fewer layers than the language model has, or as many
)
def test_new_prefusion_layers_are_copies_of_the_first_ones(layers, scan_layers):
    model = tiny.model("paper", vision=VISION, prefusion_layers=layers, compressor="average_pool")
    one = stage(model, scan_layers=scan_layers, prefusion_init="copy")
    params = starting_params(one, previous(unrolled=not scan_layers), KEY)
    where = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(params)]
    assert len(set(where)) == len(where)  # a training step cannot donate an array twice
    params = llava_mini.unrolled(params)
    assert len(params.prefusion.layers) == layers
    for ours, theirs in zip(params.prefusion.layers, params.llm.layers[:layers], strict=True):
        assert_same(arrays(ours), arrays(theirs))


def test_prefusion_that_exists_is_not_overwritten():
    one = stage(prefusion_init="copy")
    assert_same(arrays(starting_params(one, previous(MINI), KEY)), arrays(previous(MINI)))


def test_a_parameter_that_changed_its_shape_is_refused():
    wider = tiny.model("llava-1.5", dataclasses.replace(tiny.LLM, mlp_width=64), VISION)
    with pytest.raises(InputError, match=r"stage2: llm/layers/\w+ has shape .*name it in `fresh`"):
        starting_params(stage(wider), previous(), KEY)
    fresh = ("*/gate_proj", "*/up_proj", "*/down_proj")
    params = starting_params(stage(wider, fresh=fresh), previous(), KEY)
    assert params.llm.layers.up_proj.shape == (2, 64, 32)


def test_a_stage_may_have_another_mesh_than_the_one_before():
    model = tiny.model("paper", vision=VISION, prefusion_layers=1, compressor="average_pool")
    one = stage(model, prefusion_init="copy")
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        split = starting_params(one, previous(), KEY)
        wanted = param_tree.paths(param_tree.abstract(llava_mini.spec(model)), is_leaf=None)
        for path, leaf in param_tree.paths(split, is_leaf=None).items():
            assert leaf.sharding.spec == wanted[path].sharding.spec, path
            assert len(leaf.devices()) == 4, path
    assert_same(arrays(split), arrays(starting_params(one, previous(), KEY)))
    whole = starting_params(one, split, KEY)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(whole)} == {1}
    assert_same(arrays(whole), arrays(split))


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
    learnt = param_tree.paths(state.trainable, is_leaf=None)
    assert all(param_tree.matches(path, trainable) for path in learnt)
    still = param_tree.paths(state.frozen, is_leaf=None)
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
