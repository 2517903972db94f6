"""What packing would make of a stage: full rows, and work that is not spent on padding.

what each conversation needs --compare--> a Way for rows of like length, one for packed rows

Counted, not timed: model FLOPs of training steps, padding included (cost/flops.py).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llava_mini_jax.cost.flops import step_flops
from llava_mini_jax.cost.network import Shape
from llava_mini_jax.data.batches.examples import Buckets, fused_size, power_of_two
from llava_mini_jax.data.batches.packed import fused_room
from llava_mini_jax.data.sets.order import GroupedOrder, Groups
from llava_mini_jax.data.sets.packing import Needs, PackedOrder
from llava_mini_jax.training.stages import TrainConfig

PACKED = "packed"


class Way(NamedTuple):
    """An epoch in whole batches."""

    conversations: int
    rows: int
    positions: float  # share of those computed that hold something
    images: float  # the same of images
    flops: float  # of training, for a conversation


def compare(stage: TrainConfig, needs: Needs) -> dict[str, Way]:
    """Ways of the stage's batches, by name; `stage.packing` says how rows are packed."""
    packing, most = stage.packing, stage.prompt.max_length
    modality = np.where(needs.images > 0, 0, 2).astype(np.int8)
    like = GroupedOrder(
        Groups(modality, needs.positions), stage.batch_size, stage.seed, by_length=True
    )
    packed = PackedOrder(needs, most, packing.images, packing.window, stage.seed)
    alone = [(int(number),) for number in like.epoch(0)]
    return {
        "a row each, of like length": _way(stage, needs, alone, packed=False),
        PACKED: _way(stage, needs, packed.epoch(0), packed=True),
    }


def _way(stage: TrainConfig, needs: Needs, rows: Sequence[tuple[int, ...]], *, packed: bool) -> Way:
    B = min(stage.batch_size, len(rows))
    batches = [rows[start : start + B] for start in range(0, len(rows) - B + 1, B)]
    taken = positions = images = 0
    work, seen, count = 0.0, 0, 0
    for batch, shape in zip(batches, _shapes(stage, needs, batches, packed=packed), strict=True):
        numbers = [number for row in batch for number in row]
        count += len(numbers)
        taken += int(np.minimum(needs.positions[numbers], stage.prompt.max_length).sum())
        seen += int(needs.images[numbers].sum())
        positions += B * shape.sequence
        images += B * shape.images
        work += step_flops(stage.model, stage.trainable, shape, stage.lora)
    return Way(count, B * len(batches), taken / positions, seen / max(images, 1), work / count)


def _shapes(
    stage: TrainConfig, needs: Needs, batches: Sequence, *, packed: bool
) -> Iterator[Shape]:
    """As data/batches/examples.py and packed.py pad the batches."""
    most = stage.prompt.max_length
    buckets, longest = Buckets(stage.lengths, (1,)), stage.lengths[-1]
    for batch in batches:
        numbers = [number for row in batch for number in row]
        fused = int(needs.fused[numbers].max())
        if packed:
            S, I = longest, stage.packing.images
            F = fused_room(fused, longest)
        else:
            S = buckets.length(min(most, int(needs.positions[numbers].max())))
            count = int(needs.images[numbers].max())
            I, F = power_of_two(count) if count else 0, fused_size(fused, S)
        yield dataclasses.replace(_EMPTY, rows=len(batch), images=I, parts=stage.images.parts,
            text=S, fused=min(F, S), sequence=S, logits=S - 1,
            question=stage.model.declared.question or None)  # fmt: skip


_EMPTY = Shape(rows=0, images=0, parts=1, text=0, sequence=0, logits=0)
