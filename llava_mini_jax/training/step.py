"""One training step: loss, gradients of the trainable part, update.

batch --> micro-batches --> loss, gradients: float32 sums --> finite? --> AdamW --> next state
                                                                 '--no--> the state as it was
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array
from llava_mini_jax.training.loss import Sums, loss, mean, supervised_tokens


@struct.dataclass
class TrainState:
    step: Array  # int32 scalar: steps taken, those that were skipped included
    skipped_in_a_row: Array  # int32 scalar: steps skipped since the last one that was not
    trainable: Any  # a LlavaMini, None where frozen: no gradient and no optimiser state there
    frozen: Any  # a LlavaMini, None where trainable
    opt_state: Any


def init_state(
    params: LlavaMini, trainable: tuple[str, ...], optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state that trains the parameters whose path matches `trainable`."""
    selected, frozen = param_tree.split(params, lambda path: param_tree.matches(path, trainable))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        trainable=selected,
        frozen=frozen,
        # Compiled, the float32 copies that moments take their shapes from are never made.
        opt_state=jax.jit(optimizer.init)(selected),
    )
    return sharding.settle(state)


def abstract_state(
    params: LlavaMini, trainable: tuple[str, ...], optimizer: optax.GradientTransformation
) -> TrainState:
    """`init_state` of abstract parameters: its shapes, dtypes and shardings; nothing is made."""
    state = jax.eval_shape(partial(init_state, trainable=trainable, optimizer=optimizer), params)
    whole = jax.sharding.get_abstract_mesh().empty

    def place(x: Any) -> jax.ShapeDtypeStruct:
        where: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if not whole:  # of scalars JAX says nothing
            spec = x.sharding.spec if x.ndim else jax.P()
            where = jax.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, state)


@partial(
    jax.jit,
    static_argnames=("cfg", "optimizer", "accumulate", "loss_chunk", "z_loss"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: TrainBatch,
    *,
    cfg: LlavaMiniConfig,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    loss_chunk: int = 0,
    z_loss: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """(next state, metrics as scalars on the device) of a step over B rows.

    `accumulate` micro-batches of B / accumulate rows run one after the other and make one update,
    that of the whole batch. `loss_chunk` and `z_loss` are explained in loss.py.

    A step whose loss or gradient is not finite changes no parameter and no optimiser state, its
    learning rate schedule included; `skipped_in_a_row` counts such steps up to the present one.

    Metrics: loss (mean cross-entropy in nats, without the z-loss), z_loss (mean, unweighted; only
    where it is trained), grad_norm (before clipping), tokens, right_tokens, skipped (0 or 1),
    skipped_in_a_row; where rows choose their vision tokens, for each count n rows_at_n, and the
    sums cross_entropy_at_n and tokens_at_n over them.
    """
    # Of the whole batch: a micro-batch with few tokens must not weigh as much as a full one.
    tokens = supervised_tokens(batch)

    def objective(trainable: LlavaMini, micro: TrainBatch) -> tuple[Array, Sums]:
        # The frozen part is closed over: nothing is differentiated with respect to it.
        params = param_tree.merge(trainable, state.frozen)
        return loss(params, micro, cfg, chunk=loss_chunk, z_loss=z_loss, tokens=tokens)

    gradients = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        grads, sums = gradients(state.trainable, batch)
    else:
        grads, sums = _accumulated(gradients, state.trainable, _micro_batches(batch, accumulate))
    metrics = {
        "loss": mean(sums["cross_entropy"], tokens),
        "grad_norm": optax.tree.norm(grads),
        "tokens": tokens,
        "right_tokens": sums["right_tokens"],
    }
    if z_loss:
        metrics["z_loss"] = mean(sums["z_loss"], tokens)
    metrics |= {name: total for name, total in sums.items() if "_at_" in name}

    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    updated = optax.apply_updates(state.trainable, updates), opt_state
    # Known before the update, so that this can be written over the old state as it is computed.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state.trainable, state.opt_state)
    )
    state = dataclasses.replace(
        state,
        # A skipped step has used up its batch: batch k belongs to step k.
        step=state.step + 1,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        trainable=trainable,
        opt_state=opt_state,
    )
    skipped = {"skipped": 1 - finite, "skipped_in_a_row": state.skipped_in_a_row}
    return state, metrics | skipped


@partial(jax.jit, static_argnames=("cfg", "loss_chunk"))
def heldout_sums(
    state: TrainState, batch: TrainBatch, *, cfg: LlavaMiniConfig, loss_chunk: int = 0
) -> Sums:
    """What `loss.logit_sums` says of a batch that nothing is learnt from."""
    params = param_tree.merge(state.trainable, state.frozen)
    return loss(params, batch, cfg, chunk=loss_chunk)[1]


def _micro_batches(batch: TrainBatch, count: int) -> TrainBatch:
    """The batch with a leading axis of micro-batches: [B, ...] -> [count, B / count, ...].

    Row b goes to micro-batch b mod count. A device has neighbouring rows of the batch; dealt out
    like this, it has as many rows of every micro-batch, and no row moves to another device. (If
    micro-batches were neighbouring rows, the first would lie on the first devices alone.)
    """

    def deal(array: Array) -> Array:
        B, *rest = array.shape
        if B % count:
            raise ValueError(f"{B} rows cannot be dealt to {count} micro-batches")
        shape = (B // count, count, *rest)
        spec = sharding.partition(shape, ("batch", *(None,) * (len(shape) - 1)))
        return jnp.moveaxis(jnp.reshape(array, shape, out_sharding=spec), 1, 0)

    return jax.tree.map(deal, batch)


def _accumulated(gradients: Any, trainable: LlavaMini, micros: TrainBatch) -> tuple[Any, Sums]:
    """Sums of `gradients(trainable, micro-batch)` over micro-batches, added in float32."""

    def add(total: Any, micro: TrainBatch) -> tuple[Any, Sums]:
        grads, sums = gradients(trainable, micro)
        return jax.tree.map(jnp.add, total, grads), sums  # float32 whatever the gradients are

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), trainable)
    total, sums = jax.lax.scan(add, zeros, micros)
    # In the parameters' dtype, as gradients of a whole batch are.
    grads = jax.tree.map(lambda a, leaf: a.astype(leaf.dtype), total, trainable)
    return grads, jax.tree.map(lambda each: each.sum(0), sums)
