"""A training step for arrays that do not exist, on a mesh of devices that need not be here.

stage, images a row --abstract state and batch--> train_step, traced
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.cost import network
from llava_mini_jax.cost.network import Shape
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.models.llava_mini import Inputs
from llava_mini_jax.models.texts import Packed
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import TrainConfig, abstract_params
from llava_mini_jax.training.step import abstract_state, train_step


def images_of(stage: TrainConfig) -> int:
    """Images or frames of a row: files say nothing before they are read."""
    if stage.packing.window:
        return stage.packing.images
    return max(1, stage.data.frames) if isinstance(stage.data, DigitsConfig) else 1


def fused_of(stage: TrainConfig) -> int:
    """Positions of text that an image is fused with, at most: of packed rows a quarter is assumed,
    for one of their conversations."""
    length = stage.lengths[-1]
    return max(1, length // 4) if stage.packing.window else length


def shape_of(stage: TrainConfig, images: int, fused: int | None = None) -> Shape:
    """The sizes of a batch of the longest bucket; `fused` positions of text, or as many as there
    may be, are fused."""
    S = stage.lengths[-1]
    if fused is None and stage.packing.window:
        fused = fused_of(stage)
    return Shape(
        rows=stage.batch_size,
        images=images,
        parts=stage.images.parts,
        text=S,
        fused=fused,
        sequence=S,
        wide=S if stage.model.inside_layers else 0,
        logits=S - 1,
        question=stage.model.declared.question or None,
    )


def abstract_batch(stage: TrainConfig, shape: Shape) -> TrainBatch:
    """A batch of these sizes, its rows split over the current mesh."""
    inputs = network.inputs(stage.model, shape)
    inputs = dataclasses.replace(inputs, padding_side=stage.prompt.padding_side)
    if stage.packing.window:
        inputs = _packed(inputs, shape)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = sharding.partition(x.shape, ("batch", *(None,) * (len(x.shape) - 1)))
        if spec is None:
            return x
        # On the devices themselves, as real batches are: else the step would be another program.
        where = jax.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    labels = jax.ShapeDtypeStruct((shape.rows, shape.sequence), jnp.int32)
    chooses = stage.model.declared.choice is not None
    tokens_B = jax.ShapeDtypeStruct((shape.rows,), jnp.int32) if chooses else None
    return jax.tree.map(placed, TrainBatch(inputs=inputs, labels_BS=labels, tokens_B=tokens_B))


def _packed(inputs: Inputs, shape: Shape) -> Inputs:
    """As data/batches/packed.py lays them out: each image has text of its own."""

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype)

    packed = Packed(
        segments_BS=array(shape.sequence),
        fuse_BIF=array(shape.images, shape.fused_text),
        shares_BI=array(shape.images, dtype=jnp.float32),
    )
    return dataclasses.replace(inputs, fuse_BF=array(0), packed=packed)


def traced_step(stage: TrainConfig, shape: Shape) -> Any:
    """`train_step` of this stage on a batch of these sizes, traced.

    A mesh of the devices has to be set, if only of one.
    """
    params = abstract_params(stage)
    chosen, _ = param_tree.split(params, lambda path: param_tree.matches(path, stage.trainable))
    optimizer = make_optimizer(stage.optimizer, stage.steps, chosen)
    return train_step.trace(
        abstract_state(params, stage.trainable, optimizer),
        abstract_batch(stage, shape),
        cfg=stage.model,
        optimizer=optimizer,
        accumulate=stage.accumulate,
        loss_chunk=stage.loss_chunk,
        z_loss=stage.z_loss,
    )
