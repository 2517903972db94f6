"""From a stage's data to batches on the devices, as all processes agree about them.

    data set --make_batches--> this process's rows --grow, put--> the batch on all devices
                                   |        ^
                                   '-gather-'   what every process says: sizes, broken samples,
                                                whether it is asked to stop

Broken samples of all processes go to workdir/quarantine.jsonl (data/batches/quarantine.py).
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llava_mini_jax import distributed, sharding
from llava_mini_jax.cost.flops import shape_of, step_flops
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Sizes,
    TrainBatch,
    grow,
    powers_of_two,
    sizes_of,
)
from llava_mini_jax.data.batches.needs import as_needs, needs_of
from llava_mini_jax.data.batches.packed import conversations_of
from llava_mini_jax.data.batches.pipeline import Batch, Encoder, Rejected, Source, make_batches
from llava_mini_jax.data.batches.quarantine import Quarantine
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.data.sets.packing import Needs, PackedOrder
from llava_mini_jax.data.sets.sources import Samples, SourcesConfig
from llava_mini_jax.terminal import counting
from llava_mini_jax.training.metrics import Counted
from llava_mini_jax.training.stages import TrainConfig

MAX_FRAMES = 1024  # images or frames of one training sample


class Arrival(NamedTuple):
    """A batch of all processes."""

    batch: TrainBatch  # on the devices
    rejected: list[Rejected]
    conversations: int
    positions: int  # of the language model that are no padding
    images: int  # or frames
    stop: bool  # a process was asked to
    waited: float  # seconds that this process waited for its rows


def arrivals(
    stage: TrainConfig,
    source: Source,
    tokenizer: Any,
    workdir: epath.Path,
    first_step: int,
    stop: Sequence[int],
) -> Iterator[tuple[int, Arrival]]:
    """(step, its batch) from the step after `first_step` to the stage's last one."""
    path = workdir / "quarantine.jsonl"
    quarantine = open_quarantine(stage, path, len(source), first_step)
    rows = batches(stage, source, tokenizer, rows=stage.batch_size, first_step=first_step)
    for step in range(first_step + 1, stage.steps + 1):
        arrival = receive(rows, stage.prompt.padding_side, stop)
        quarantine.add(step, arrival.rejected)
        yield step, arrival


def open_quarantine(
    stage: TrainConfig, path: epath.Path, total: int, first_step: int
) -> Quarantine:
    first = distributed.is_first()
    return Quarantine(path, stage.name, total, stage.bad_samples, first_step, write=first)


def counted(stage: TrainConfig, arrival: Arrival) -> Counted:
    """What metrics.py wants to know about a batch."""
    flops = step_flops(stage.model, stage.trainable, shape_of(arrival.batch), stage.lora)
    seen = arrival.conversations, arrival.positions, arrival.images
    return Counted(*seen, flops, arrival.waited)


def open_data(data: DigitsConfig | SourcesConfig) -> DigitsPages | Samples:
    return DigitsPages(data, data.samples) if isinstance(data, DigitsConfig) else Samples(data)


def epochs(stage: TrainConfig, samples: int) -> str:
    """How often a stage sees its data, in words."""
    seen = stage.steps * stage.batch_size
    return (
        f"{samples:,} samples, {stage.steps:,} steps x {stage.batch_size} = "
        f"{seen / samples:.3g} epochs"
    )


def batches(
    stage: TrainConfig,
    source: Source,
    tokenizer: Any,
    *,
    rows: int,
    first_step: int,
    threads: int = 0,
) -> Iterator[Batch]:
    """This process's part of the batches of `rows` rows from `first_step` on.

    `threads` read and encode ahead; 0 is half of the cores.
    """
    share, shares = sharding.batch_share()
    layout, encode = layout_of(stage), Encoder(tokenizer, stage.prompt, stage.images)
    packed = packed_order(stage, source, encode, layout) if stage.packing.window else None
    return make_batches(
        source,
        encode,
        layout,
        batch_size=rows,
        seed=stage.seed,
        first_step=first_step,
        process=share,
        processes=shares,
        grouping=stage.data.grouping if isinstance(stage.data, SourcesConfig) else "none",
        draw_tokens=stage.draw_tokens,
        threads=threads,
        packed=packed,
    )


def layout_of(stage: TrainConfig) -> BatchLayout:
    return BatchLayout.of(
        stage.model,
        stage.images.parts,
        buckets=Buckets(lengths=stage.lengths, images=powers_of_two(1, MAX_FRAMES)),
        max_length=stage.prompt.max_length,
        padding_side=stage.prompt.padding_side,
    )


def packed_order(
    stage: TrainConfig, source: Source, encode: Encoder, layout: BatchLayout
) -> PackedOrder:
    """Which conversations share a row. Says on stderr how full the first epoch's rows will be."""
    needs = count_needs(stage, source, encode, layout)
    packing, room = stage.packing, layout.max_length
    order = PackedOrder(needs, room, packing.images, packing.window, stage.seed)
    if distributed.is_first():
        filling = order.filling()
        print(
            f"{stage.name}: an epoch's {len(source):,} conversations are packed into"
            f" {filling.rows:,} rows of {room} positions, {filling.positions:.1%} of them filled;"
            f" {filling.images:.3g} images a row on average, {filling.most_images} at most, and"
            f" room for {packing.images}",
            file=sys.stderr,
        )
    return order


def count_needs(stage: TrainConfig, source: Source, encode: Encoder, layout: BatchLayout) -> Needs:
    """What each sample takes of a row: every process counts a share, and tells the others."""
    process, processes = jax.process_index(), jax.process_count()
    share = -(-len(source) // processes)
    mine = range(len(source))[process * share : (process + 1) * share]
    counted = np.zeros((share, len(Needs._fields)), np.int32)
    done = 0
    with counting(f"{stage.name}: conversations are counted", len(mine)) as bar:
        for piece in needs_of(source, encode.text, layout, mine):
            counted[done : done + len(piece)] = piece
            done += len(piece)
            bar(completed=done)
    return as_needs(distributed.gather(counted).reshape(-1, counted.shape[1])[: len(source)])


def receive(source: Iterator[Batch], padding_side: str, stop: Sequence[int] = ()) -> Arrival:
    """The next batch; every process calls it at the same step."""
    began = time.perf_counter()
    own, rejected = next(source)
    waited = time.perf_counter() - began
    inputs = own.inputs
    positions, images = (inputs.slots_BS >= 0).sum(), inputs.frames_BI.sum()
    counts = conversations_of(own), positions, images, len(rejected), bool(stop)
    # One gather a step for everything that the processes must agree on.
    told = distributed.gather(np.array([*sizes_of(own), *counts], np.int32))
    sizes = Sizes(*told[:, : len(Sizes._fields)].max(0).tolist())
    told = told[:, len(Sizes._fields) :].sum(0).tolist()
    conversations, positions, images, broken, stopping = told
    # `broken` is the sum over all processes: either each of them gathers, or none.
    everyone = distributed.gather_json(list(rejected)) if broken else []
    # Processes along the tensor axis have the same rows: each is counted once.
    _, shares = sharding.batch_share()
    copies = jax.process_count() // shares
    return Arrival(
        batch=sharding.put_batch(grow(own, sizes, padding_side)),
        rejected=[Rejected(*each) for each in everyone],
        conversations=conversations // copies,
        positions=positions // copies,
        images=images // copies,
        stop=stopping > 0,
        waited=waited,
    )
