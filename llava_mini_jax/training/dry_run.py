"""What a run would train and what memory it takes, told before it starts.

    python train.py CONFIG --dry-run           as it is configured
    llava-mini plan training CONFIG [...]      on known hardware

The second one prints the table of docs/sharding.md. Neither needs a device or weights.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import dialect_of
from llava_mini_jax.cost.chips import COMPILED
from llava_mini_jax.cost.device_memory import FLOAT32, Memory
from llava_mini_jax.cost.flops import recomputed_flops, step_flops
from llava_mini_jax.errors import InputError
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.terminal import GIB, columns, human_bytes
from llava_mini_jax.training import feed, step_program
from llava_mini_jax.training.stages import TrainConfig, check, stacked_spec
from llava_mini_jax.training.step_memory import base_bytes, estimate, groups

# What a device has, in GiB. A tenth is left to the runtime and to what an estimate misses.
DEVICES = {
    "24 GB GPU": 24,
    "80 GB GPU": 80,
    "141 GB GPU": 140,
    "TPU v5e": 16,
    "TPU v6e": 32,
    "TPU v5p": 95,
}
USABLE = 0.9
# (what it is, the device, the mesh, dtype of parameters and first moments): docs/sharding.md says
# why. A v5p-8 has four devices.
HARDWARE = (
    ("8 x 80 GB GPU", "80 GB GPU", MeshConfig(fsdp=8), "float32"),
    ("1 x 141 GB GPU", "141 GB GPU", MeshConfig(), "float32"),
    ("1 x 141 GB GPU", "141 GB GPU", MeshConfig(), "bfloat16"),
    ("2 x 141 GB GPU", "141 GB GPU", MeshConfig(fsdp=2), "float32"),
    ("TPU v5p-8", "TPU v5p", MeshConfig(fsdp=4), "float32"),
    ("TPU v5e-64", "TPU v5e", MeshConfig(fsdp=64), "float32"),
)


def describe(stages: Sequence[TrainConfig], images: int | None = None) -> None:
    """Prints a table of parameters, and the settings that matter, of every stage.

    `images`: of a row, or frames; None: as many as the stage says, one where it does not. Raises
    InputError where rows have no room for them.
    """
    from rich.console import Console

    for stage in stages:
        check(stage)
    counts = [_images(stage, images) for stage in stages]
    for stage, count in zip(stages, counts, strict=True):
        console = Console()
        console.print(_table(stage))
        for line in _lines(stage):
            console.print(f"  {line}", highlight=False)
        console.print(_memory_table(stage, count))
        console.print(f"  {_bound(stage, count)}", highlight=False, soft_wrap=True)
        if max(dataclasses.astuple(stage.mesh)) > 1:
            console.print("  where parameters are, and bytes on one device:", highlight=False)
            for line in layout(stage):
                console.print(f"    {line}", highlight=False, soft_wrap=True)
        console.print()


def _table(stage: TrainConfig) -> Any:
    from rich.table import Table

    itemsize = jnp.dtype(stage.param_dtype).itemsize
    # A trained scalar has a gradient beside it, and Adam's two moments.
    moments = jnp.dtype(stage.optimizer.first_moment_dtype).itemsize + FLOAT32
    table = Table(title=f"{stage.name}: {dialect_of(stage.model)}", title_justify="left")
    for column in ("component", "parameters", "trained", "bytes with gradient and AdamW state"):
        table.add_column(column, justify="left" if column == "component" else "right")
    counts, trained, stored = Counter[str](), Counter[str](), Counter[str]()
    for path, leaf in param_tree.paths(stacked_spec(stage)).items():
        component, size = path.split("/")[0], math.prod(leaf.shape)
        counts[component] += size
        trained[component] += size * param_tree.matches(path, stage.trainable)
        stored[component] += base_bytes(leaf, stage) if _is_base(path) else size * itemsize
    counts["all"], trained["all"], stored["all"] = (c.total() for c in (counts, trained, stored))
    for name, count in counts.items():
        if name == "all":
            table.add_section()
        total = stored[name] + trained[name] * (itemsize + moments)
        table.add_row(name, *(f"{n:,}" for n in (count, trained[name], total)))
    return table


def _is_base(path: str) -> bool:
    """Whether a weight lies beside an adapter, where it may be narrower than `param_dtype`."""
    return path.endswith("/base")


def _images(stage: TrainConfig, asked: int | None) -> int:
    if asked is None:
        return step_program.images_of(stage)
    if stage.packing.window:
        raise InputError(
            f"{stage.name} is packed: its rows have room for packing.images"
            f" ({stage.packing.images}) images, so leave out --dry-run-images"
        )
    tokens, length = stage.model.tokens_per_image(stage.images.parts), stage.lengths[-1]
    if not 1 <= asked <= length // max(1, tokens):
        raise InputError(
            f"--dry-run-images is {asked}; rows of {stage.name} have {length} positions, room for"
            f" 1 to {length // max(1, tokens)} images or frames of {tokens} tokens"
        )
    return asked


def _memory_table(stage: TrainConfig, images: int) -> Any:
    from rich.table import Table

    found = estimate(stage, images)
    rows = stage.batch_size // stage.accumulate
    sizes = f"{rows} rows of {stage.lengths[-1]} positions at a time"
    if stage.packing.window:
        sizes += f", packed, {images} images each with {step_program.fused_of(stage)} of text"
    else:
        sizes += f", {images} images or frames each" if images > 1 else ", one image each"
        if stage.model.declared.question:
            sizes += " (an image counts once for each question about it)"
    title = f"estimated memory of one device: {sizes}"
    table = Table(title=title, title_justify="left", show_header=False)
    for name, size in found.terms.items():
        table.add_row(name, human_bytes(size, "GiB"))
    table.add_section()
    table.add_row(f"at the peak ({found.peak})", human_bytes(found.total, "GiB"))
    for name in found.phases:
        if name != found.peak:
            table.add_row(f"in phase {name}", human_bytes(found.total_in(name), "GiB"))
    table.add_section()
    for name, capacity in DEVICES.items():
        table.add_row(name, "fits" if _fits(found, capacity) else "does not fit")
    return table


def _bound(stage: TrainConfig, images: int) -> str:
    """What products alone let a step reach, whatever else there is to wait for."""
    shape = step_program.shape_of(stage, images)
    model = step_flops(stage.model, stage.trainable, shape, stage.lora)
    again = recomputed_flops(
        stage.model, stage.trainable, shape, stage.lora, loss_chunk=stage.loss_chunk
    )
    total = (model + again) / stage.mesh.devices
    seconds = ", ".join(f"{name} {total / c.tflops / 1e12:.3g} s" for name, c in COMPILED.items())
    return (
        f"products of a device: {total / 1e12:.4g} TFLOP a step, {again / (model + again):.0%} of"
        f" them computed again (remat {stage.model.remat}), so MFU at most"
        f" {model / (model + again):.2f}; at the bfloat16 peak {seconds}"
    )


def _fits(found: Memory, capacity: int) -> bool:
    return found.total <= USABLE * capacity * GIB


def plan(stage: TrainConfig, mesh: MeshConfig, capacity: int) -> tuple[TrainConfig, Memory]:
    """The stage on a mesh with as few micro-batches as fit devices of `capacity` GiB.

    Where nothing fits, with one row a device and micro-batch.
    """
    shards, accumulate = mesh.batch_shards, 1
    while True:
        chosen = dataclasses.replace(stage, mesh=mesh, accumulate=accumulate)
        found = estimate(chosen)
        accumulate *= 2
        if _fits(found, capacity) or stage.batch_size % (accumulate * shards):
            return chosen, found


def hardware(stages: Sequence[TrainConfig]) -> Iterator[dict[str, Any]]:
    """What every stage takes of a device, in bytes, on the hardware of HARDWARE."""
    for stage in stages:
        for name, device, mesh, dtype in HARDWARE:
            moments = dataclasses.replace(stage.optimizer, first_moment_dtype=dtype)
            given = dataclasses.replace(stage, param_dtype=dtype, optimizer=moments)
            chosen, found = plan(given, mesh, DEVICES[device])
            yield {
                "stage": stage.name,
                "hardware": name,
                "state": dtype,
                "mesh": str(mesh),
                "accumulate": chosen.accumulate,
                "bytes": groups(found) | {"total": found.total},
                "fits": _fits(found, DEVICES[device]),
            }


def hardware_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same as Markdown, in GiB."""
    header = ["stage", "hardware", "state", "mesh", "accumulate", "parameters", "optimiser"]
    header += ["gradients", "activations", "total", "fits"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for row in rows:
        cells = [str(row[name]) for name in header[:5]]
        cells += [f"{size / GIB:.1f}" for size in row["bytes"].values()]
        lines.append(" | ".join([*cells, "yes" if row["fits"] else "no"]))
    return [f"| {line} |" for line in lines]


def layout(stage: TrainConfig) -> list[str]:
    """Where every parameter lies on the stage's mesh, one line each, and what a device has of it.

    path   shape   logical axes   PartitionSpec   bytes a device
    """
    rows, itemsize = [], jnp.dtype(stage.param_dtype).itemsize
    with sharding.planned_mesh(stage.mesh):
        for path, leaf in param_tree.paths(stacked_spec(stage)).items():
            shape, names = " x ".join(map(str, leaf.shape)), " ".join(a or "-" for a in leaf.axes)
            placed = " ".join(sharding.placement(leaf.shape, leaf.axes))
            piece = math.prod(sharding.piece(leaf.shape, leaf.axes)) * itemsize
            piece = base_bytes(leaf, stage) if _is_base(path) else piece
            rows.append((path, shape, names, placed, f"{piece:,}"))
    return columns(rows, left=4)


def _lines(stage: TrainConfig) -> list[str]:
    parts, model, optimizer = stage.images.parts, stage.model, stage.optimizer
    rates = [f"{optimizer.learning_rate:g}"]
    rates += [f"{g.learning_rate:g} for {', '.join(g.patterns)}" for g in optimizer.groups]
    return [
        f"starts from: {stage.start}" + (f", new: {', '.join(stage.fresh)}" if stage.fresh else ""),
        f"vision tokens of an image in the language model: {_vision_tokens(stage)}"
        f" (of {model.patches_per_image(parts)} patches)",
        f"{stage.steps} steps of {stage.batch_size} examples; learning rate {'; '.join(rates)}",
        f"parameters {stage.param_dtype}, computed in {model.compute_dtype}; mesh {stage.mesh}",
        f"data: {stage.data}",
        _epochs(stage),
    ]


def _vision_tokens(stage: TrainConfig) -> str:
    if stage.draw_tokens:
        return f"drawn for each row from {', '.join(map(str, stage.draw_tokens))}"
    return str(stage.model.tokens_per_image(stage.images.parts))


def _epochs(stage: TrainConfig) -> str:
    try:
        return feed.epochs(stage, len(feed.open_data(stage.data)))
    except InputError as error:
        seen = f"{stage.steps * stage.batch_size:,} samples in all"
        return f"{seen}, epochs not known: the data itself cannot be opened: {error}"
