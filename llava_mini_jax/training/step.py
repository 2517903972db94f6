"""One training step: loss, gradients of the trainable part, update."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.examples import TrainBatch
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array
from llava_mini_jax.training.loss import loss


@struct.dataclass
class TrainState:
    step: Array  # int32 scalar: optimiser steps taken
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
        trainable=selected,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(selected),
    )
    return sharding.settle(state)


@partial(jax.jit, static_argnames=("cfg", "optimizer"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: TrainBatch,
    *,
    cfg: LlavaMiniConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """(next state, metrics as scalars on the device)."""

    def objective(trainable: LlavaMini):
        return loss(param_tree.merge(trainable, state.frozen), batch, cfg)

    (value, sums), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **sums}
    trainable = optax.apply_updates(state.trainable, updates)
    return (
        dataclasses.replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state),
        metrics,
    )
