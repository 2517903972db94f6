"""The optimiser: table 9's rates by path, the schedule's formula, and AdamW worked out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training.optimizer import Group, OptimizerConfig, make_optimizer, schedule
from llava_mini_jax.training.stages import STAGE_1, STAGE_2
from tests import tiny

CONFIG = OptimizerConfig(
    learning_rate=1e-4,
    groups=(),
    warmup_ratio=0.03,
    weight_decay=0.0,
    max_grad_norm=1.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
)
# Paper, table 9: the rate of each component, "-" where it is frozen.
TABLE_9 = {
    "stage 1": (
        STAGE_1,
        dataclasses.replace(CONFIG, learning_rate=1e-3),
        {"projector": 1e-3},
    ),
    "stage 2": (
        STAGE_2,
        dataclasses.replace(CONFIG, groups=(Group(patterns=STAGE_1, learning_rate=1e-5),)),
        {"projector": 1e-5, "compressor": 1e-4, "prefusion": 1e-4, "llm": 1e-4},
    ),
}


def full(tree, value):
    """A number in place of every parameter: what happens depends on paths, not on shapes."""
    return jax.tree.map(lambda _: jnp.array(value), tree, is_leaf=param_tree.is_spec)


def run(optimizer, params, gradients):
    """Every step's updates, by path."""
    state, steps = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(param_tree.paths(updates))
    return steps


@pytest.mark.parametrize("stage", TABLE_9)
def test_components_move_at_the_rates_of_table_9(stage):
    trained, config, rates = TABLE_9[stage]
    spec = llava_mini.spec(tiny.model("release"))
    trainable, _ = param_tree.split(spec, lambda path: param_tree.matches(path, trained))
    optimizer = make_optimizer(config, 100, trainable)
    # Adam's update for a gradient that never changes is the rate itself; warm-up ends at step 3.
    gradient = full(trainable, 0.5)
    updates = run(optimizer, full(trainable, 0.0), [gradient] * 4)
    assert {path.split("/")[0] for path in updates[3]} == set(rates)
    for path, update in updates[3].items():
        # Adam's correction 1 - 0.999^k is a small difference, which costs float32 three digits.
        np.testing.assert_allclose(-update, rates[path.split("/")[0]], rtol=1e-4, err_msg=path)
        np.testing.assert_allclose(updates[1][path], update / 3, rtol=1e-4)
        assert (updates[0][path] == 0).all()


def test_frozen_leaves_have_no_optimiser_state():
    spec = llava_mini.spec(tiny.model("paper"))
    trainable, _ = param_tree.split(spec, lambda path: param_tree.matches(path, STAGE_1))
    state = jax.eval_shape(
        make_optimizer(CONFIG, 10, trainable).init, param_tree.abstract(trainable)
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    moments = [leaf.shape for leaf in param_tree.paths(trainable).values()]
    assert sorted(shapes) == sorted(2 * moments)  # Adam's two, of the projector and nothing else


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 1000, 30), (0.5, 8, 4), (0, 10, 0)])
def test_schedule_follows_the_formula(ratio, steps, warmup):
    rates = schedule(2e-3, ratio, steps)
    for step in {0, 1, warmup // 2, warmup, warmup + 1, steps // 2, steps - 1, steps}:
        if step < warmup:
            expected = 2e-3 * step / warmup
        else:
            expected = 1e-3 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        np.testing.assert_allclose(rates(step), expected, rtol=1e-5, atol=1e-10, err_msg=str(step))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_schedule(steps):
    assert np.isfinite([schedule(1.0, 0.03, steps)(step) for step in range(steps + 1)]).all()


def test_without_warm_up_and_clipping_the_first_step_has_the_whole_rate():
    config = dataclasses.replace(CONFIG, warmup_ratio=0, max_grad_norm=0)
    params = {"llm": jnp.zeros(2)}
    (step,) = run(make_optimizer(config, 10, params), params, [{"llm": jnp.full(2, 0.5)}])
    np.testing.assert_allclose(step["llm"], -CONFIG.learning_rate, rtol=1e-4)


def test_the_second_moment_is_float32_and_falls_whatever_the_parameters_are():
    config = dataclasses.replace(CONFIG, first_moment_dtype="bfloat16", max_grad_norm=0)
    params = {"llm": jnp.ones(2, jnp.bfloat16)}
    optimizer = make_optimizer(config, 100, params)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in [0.5] + 100 * [0.0]:
        _, state = update({"llm": jnp.full(2, gradient, jnp.bfloat16)}, state, params)
    moments = {
        jax.tree_util.keystr(path).split(".")[-1]: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.ndim
    }
    assert [leaf.dtype.name for leaf in moments.values()] == ["bfloat16", "float32"]
    second = next(leaf for name, leaf in moments.items() if name.startswith("nu"))
    np.testing.assert_allclose(second, 0.001 * 0.25 * 0.999**100, rtol=1e-4)


def test_norms_and_biases_do_not_decay():
    spec = llava_mini.spec(tiny.model("release"))
    optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.1), 100, spec)
    steps = run(optimizer, full(spec, 2.0), [full(spec, 0.0)] * 2)
    still = {path for path, update in steps[1].items() if (update == 0).all()}
    assert still == {path for path in steps[1] if "norm" in path or path.endswith("bias")}
    assert "llm/final_norm" in still and "compressor/patch_norm/scale" in still
    for path in steps[1].keys() - still:
        np.testing.assert_allclose(steps[1][path], -1e-4 / 3 * 0.1 * 2.0, rtol=1e-5)


def numpy_adamw(config, rates, decays, params, gradients, steps):
    """Updates of every step by the formulas of the AdamW paper, with clipping before."""
    first = dict.fromkeys(params, 0.0)
    second = dict(first)
    warmup = max(1, round(config.warmup_ratio * steps))
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, config.max_grad_norm / norm)
        factor = step / warmup
        if step >= warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        updates = {}
        for path, g in gradient.items():
            g = scale * g
            first[path] = config.beta1 * first[path] + (1 - config.beta1) * g
            second[path] = config.beta2 * second[path] + (1 - config.beta2) * g**2
            m = first[path] / (1 - config.beta1 ** (step + 1))
            v = second[path] / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay * params[path] * decays[path]
            updates[path] = -rates[path] * factor * (m / (np.sqrt(v) + config.eps) + decay)
            params[path] = params[path] + updates[path]
        yield updates


def test_six_steps_are_those_of_adamw_in_numpy():
    config = dataclasses.replace(
        CONFIG,
        learning_rate=0.1,
        groups=(
            Group(patterns=("projector/*",), learning_rate=0.01),
            Group(patterns=("*/kernel",), learning_rate=0.5),  # the first that matches decides
        ),
        warmup_ratio=0.3,
        weight_decay=0.05,
        eps=1e-3,
    )
    rates = {"projector/kernel": 0.01, "projector/bias": 0.01, "llm/kernel": 0.5, "llm/norm": 0.1}
    decays = {path: float(path.endswith("kernel")) for path in rates}
    rng = np.random.default_rng(0)

    def draw(size):
        return {path: size * rng.standard_normal((3, 4)) for path in rates}

    def nested(flat):
        tree = {"projector": {}, "llm": {}}
        for path, value in flat.items():
            part, name = path.split("/")
            tree[part][name] = jnp.asarray(value, jnp.float32)
        return tree

    # Gradients within the largest norm, and far beyond it.
    params, gradients = draw(1.0), [draw(size) for size in (0.05, 5.0, 0.1, 100.0, 0.05, 1.0)]
    optimizer = make_optimizer(config, 6, nested(params))
    ours = run(optimizer, nested(params), map(nested, gradients))
    theirs = numpy_adamw(config, rates, decays, dict(params), gradients, 6)
    for step, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        for path, update in reference.items():
            # Float32 against float64; the cosine loses two digits near its end.
            np.testing.assert_allclose(mine[path], update, rtol=1e-4, err_msg=f"{step} {path}")
