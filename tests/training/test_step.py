"""The training step: micro-batches, chunks and bfloat16 change no result, and NaN no parameter."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import check
from llava_mini_jax.training.step import (
    TrainState,
    _accumulated,
    _micro_batches,
    init_state,
    train_step,
)
from tests import tiny

fast_compilation = tiny.fast_compilation

MODEL = tiny.model("paper", dataclasses.replace(tiny.LLM, layers=1), prefusion_layers=1)
TRAINABLE = ("projector/*", "compressor/*", "prefusion/*", "llm/*")
# Sums in another order, in float32: of a few dozen tokens, and of the gradients of a few rows.
LOSS_RTOL = 1e-6
# The same relative to a tensor's largest gradient; the floor is for gradients that are zero but
# for rounding, as that of the compressor's key bias under a softmax.
GRADIENT_RTOL = 2e-5
GRADIENT_ATOL = 1e-7
# Eight bits of mantissa give each of the dozen roundings on a token's way to its logits a relative
# error of up to 2^-9; independent ones add up to about 2^-9 * sqrt(12) = 0.7 % of a token's loss,
# and to 0.2 % of the mean over 10 tokens. Twice that, and a little.
BFLOAT16_LOSS_RTOL = 0.005


class Done(NamedTuple):
    state: TrainState
    metrics: dict[str, float]


@functools.cache
def optimizer(patterns: tuple[str, ...] = TRAINABLE):
    cfg = digits.config().stage2.optimizer
    spec = llava_mini.spec(MODEL)
    selected, _ = param_tree.split(spec, lambda path: param_tree.matches(path, patterns))
    # Warm-up of one step, whose rate is zero: the second one moves the parameters.
    return make_optimizer(dataclasses.replace(cfg, warmup_ratio=0.0), 10, selected)


def start(params: LlavaMini | None = None) -> TrainState:
    params = tiny.on_device(tiny.weights(MODEL)) if params is None else params
    return init_state(params, TRAINABLE, optimizer())


def step(state: TrainState, batch: TrainBatch, cfg: LlavaMiniConfig = MODEL, **settings) -> Done:
    state, metrics = train_step(state, batch, cfg=cfg, optimizer=optimizer(), **settings)
    return Done(state, {name: np.asarray(value).item() for name, value in metrics.items()})


def batch() -> TrainBatch:
    """Eight rows with 0 to 3 supervised tokens."""
    full = tiny.training_batch(MODEL)
    labels_BS = np.array(full.labels_BS)
    for row, keep in enumerate([1, 3, 0, 2, 1, 3, 0, 1]):
        supervised = np.flatnonzero(labels_BS[row] != IGNORE)
        labels_BS[row, supervised[keep:]] = IGNORE
    return dataclasses.replace(full, labels_BS=labels_BS)


def arrays(tree) -> dict[str, np.ndarray]:
    """{path: numpy array}, as numbers that no later donation takes away."""
    return {path: np.array(leaf) for path, leaf in param_tree.paths(tree).items()}


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """What Adam's first moment says the clipped gradient of a first step was."""
    moments = {path: m for path, m in arrays(state.opt_state).items() if "/mu/" in path}
    beta1 = digits.config().stage2.optimizer.beta1
    found = {path.split("/mu/")[1]: m / (1 - beta1) for path, m in moments.items()}
    assert found.keys() == arrays(state.trainable).keys()
    return found


def assert_close(ours: Done, theirs: Done) -> None:
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        rtol = GRADIENT_RTOL if name == "grad_norm" else LOSS_RTOL
        assert ours.metrics[name] == pytest.approx(value, rel=rtol), name
    expected = gradients(theirs.state)
    for path, gradient in gradients(ours.state).items():
        atol = GRADIENT_ATOL + GRADIENT_RTOL * np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=atol, err_msg=path)


@functools.cache
def whole() -> Done:
    done = step(start(), batch())
    assert done.metrics["tokens"] == 10 and done.metrics["grad_norm"] > 0.1
    assert "z_loss" not in done.metrics
    return done


# --- Micro-batches and chunks ---------------------------------------------------------------------


def test_accumulated_is_whole_though_micro_batches_have_different_numbers_of_tokens():
    labels_BS = batch().labels_BS[:, 1:]
    counts = [int((labels_BS[micro::4] != IGNORE).sum()) for micro in range(4)]
    assert counts == [2, 5, 0, 3]  # a mean of means would be another number
    assert_close(step(start(), batch(), accumulate=4), whole())


@pytest.mark.parametrize("chunk", [16, 60])  # a sequence of 63 predictions, filled up to 64 or 120
def test_chunked_is_whole(chunk):
    assert batch().labels_BS.shape[1] == 64
    assert_close(step(start(), batch(), loss_chunk=chunk), whole())


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((2, 2, 1), marks=pytest.mark.slow)])
def test_everything_together_on_a_mesh_is_whole(sizes):
    expected = step(start(), batch(), z_loss=0.01)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        state = start(placed())
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        placed_batch = sharding.put_batch(batch())
        found = step(state, placed_batch, accumulate=2, loss_chunk=16, z_loss=0.01)
        leaves = jax.tree.leaves(found.state)
        for leaf, before in zip(leaves, jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(before, leaf.ndim)
    assert_close(found, expected)


def placed() -> LlavaMini:
    """The parameters in the shards of the current mesh."""
    spec = param_tree.abstract(llava_mini.spec(MODEL))
    return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), tiny.weights(MODEL), spec)


def test_dealing_rows_to_micro_batches_moves_none_to_another_device():
    rows = np.arange(16, dtype=np.int32)[:, None]
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2)):
        compiled = jax.jit(_micro_batches, static_argnums=1).lower(sharding.put_batch(rows), 2)
        text = compiled.compile().as_text()
        dealt = jax.jit(_micro_batches, static_argnums=1)(sharding.put_batch(rows), 2)
    assert not any(word in text for word in ("all-to-all", "all-gather", "collective-permute"))
    np.testing.assert_array_equal(dealt[..., 0], [range(0, 16, 2), range(1, 16, 2)])


def test_rows_that_cannot_be_dealt_are_refused():
    with pytest.raises(ValueError, match="8 rows cannot be dealt to 3 micro-batches"):
        step(start(), batch(), accumulate=3)


# --- The z-loss -----------------------------------------------------------------------------------


def test_the_z_loss_is_a_metric_and_changes_the_gradient():
    done = step(start(), batch(), z_loss=0.5)
    logits = np.asarray(tiny.logits(tiny.on_device(tiny.weights(MODEL)), batch().inputs, MODEL))
    supervised = batch().labels_BS[:, 1:] != IGNORE
    chosen = logits[:, :-1].astype(np.float64)[supervised]
    expected = (np.log(np.exp(chosen).sum(-1)) ** 2).mean()
    assert done.metrics["z_loss"] == pytest.approx(expected, rel=LOSS_RTOL)
    assert done.metrics["loss"] == pytest.approx(whole().metrics["loss"], rel=LOSS_RTOL)
    assert done.metrics["grad_norm"] > 1.1 * whole().metrics["grad_norm"]


# --- Steps that are not finite --------------------------------------------------------------------


def with_nan(good: TrainBatch) -> TrainBatch:
    pixels = np.array(good.inputs.pixels_BIJYXC)
    pixels[0, 0, 0, 3, 3, 1] = np.nan
    return dataclasses.replace(good, inputs=dataclasses.replace(good.inputs, pixels_BIJYXC=pixels))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_that_is_not_finite_changes_no_bit(accumulate):
    state = step(start(), batch(), accumulate=accumulate).state
    before = arrays(state)
    for skipped in (1, 2):
        state, metrics = step(state, with_nan(batch()), accumulate=accumulate)
        assert not np.isfinite(metrics["loss"])
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, skipped)
    after = arrays(state)
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert changed == {"step", "skipped_in_a_row"}
    assert (after["step"], after["skipped_in_a_row"]) == (3, 2)
    state, metrics = step(state, batch(), accumulate=accumulate)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)
    assert (int(state.step), int(state.skipped_in_a_row)) == (4, 0)
    moved = arrays(state.trainable)
    assert all((moved[path] != before[f"trainable/{path}"]).any() for path in moved)


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is():
    # A huge weight of the head stands behind a norm's scale of zero: it moves no logit, but the
    # gradient of the scale is that weight times the activations.
    params = tiny.on_device(tiny.weights(MODEL))
    head = params.llm.lm_head.at[:].set(0.0).at[0, 0].set(3e38)
    final = params.llm.final_norm.at[0].set(0.0)
    llm = dataclasses.replace(params.llm, lm_head=head, final_norm=final)
    state = start(dataclasses.replace(params, llm=llm))
    before = arrays(state.trainable)
    state, metrics = step(state, batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    after = arrays(state.trainable)
    assert all(before[path].tobytes() == after[path].tobytes() for path in before)


# --- Dtypes ---------------------------------------------------------------------------------------


def test_bfloat16_computes_and_float32_remembers():
    cfg = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    done = step(start(), batch(), cfg)
    kept = jax.tree.leaves((done.state.trainable, done.state.frozen, done.state.opt_state))
    assert {leaf.dtype for leaf in kept} == {np.dtype("float32"), np.dtype("int32")}
    assert {leaf.dtype for leaf in kept if leaf.ndim} == {np.dtype("float32")}
    loss = whole().metrics["loss"]
    assert done.metrics["loss"] == pytest.approx(loss, rel=BFLOAT16_LOSS_RTOL)
    assert abs(done.metrics["loss"] - loss) > 10 * LOSS_RTOL * loss  # it was not float32


def test_gradients_of_bfloat16_parameters_are_added_in_float32():
    """One update of 1, then many too small for bfloat16 to add to it."""
    parts = jnp.concatenate([jnp.ones(1), jnp.full(63, 2.0**-9)])

    def gradients(_, micro):
        return {"w": micro.astype(jnp.bfloat16)}, {}

    total, _ = jax.jit(functools.partial(_accumulated, gradients))(
        {"w": jnp.zeros((), jnp.bfloat16)}, parts
    )
    assert total["w"].dtype == jnp.bfloat16
    assert float(total["w"]) == float(jnp.bfloat16(1 + 63 * 2.0**-9))


# --- Configuration --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(accumulate=0), "accumulate is 0; it must be 1 or more"),
        (dict(max_skipped=0), "max_skipped is 0; it must be 1 or more"),
        (dict(loss_chunk=-1), "loss_chunk is -1; it must be 0"),
        (dict(z_loss=-0.1), "z_loss is -0.1; it must be 0"),
        (dict(accumulate=3), "batch_size 64 cannot be divided .* make it a multiple of 3,"),
        (
            dict(accumulate=32, mesh=MeshConfig(data=2, fsdp=2)),
            "mesh.data x mesh.fsdp = 4 devices: make it a multiple of 128",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_run_are_refused(change, message):
    stage = digits.config().stage2
    with pytest.raises(InputError, match=f"stage2: .*{message}"):
        check(dataclasses.replace(stage, **change))
    check(dataclasses.replace(stage, accumulate=16, mesh=MeshConfig(data=2, fsdp=2)))
