"""What a run would train, told before it starts: `python train.py CONFIG --dry-run`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax.config import dialect_of
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training.stages import TrainConfig, check


def describe(stages: Sequence[TrainConfig]) -> None:
    """Prints a table of parameters, and the settings that matter, of every stage."""
    from rich.console import Console

    for stage in stages:
        check(stage)
    for stage in stages:
        console = Console()
        console.print(_table(stage))
        for line in _lines(stage):
            console.print(f"  {line}", highlight=False)
        console.print()


def _table(stage: TrainConfig) -> Any:
    from rich.table import Table

    itemsize = jnp.dtype(stage.param_dtype).itemsize
    table = Table(title=f"{stage.name}: {dialect_of(stage.model)}", title_justify="left")
    for column in ("component", "parameters", "trained", "bytes with gradient and AdamW state"):
        table.add_column(column, justify="left" if column == "component" else "right")
    totals = [0, 0, 0]
    spec = llava_mini.spec(stage.model)
    for field in dataclasses.fields(spec):
        leaves = param_tree.paths(getattr(spec, field.name))
        sizes = {f"{field.name}/{path}": math.prod(leaf.shape) for path, leaf in leaves.items()}
        count = sum(sizes.values())
        trained = sum(n for path, n in sizes.items() if param_tree.matches(path, stage.trainable))
        # A trained scalar has a gradient and the two moments of Adam beside it.
        row = [count, trained, count * itemsize + trained * 3 * itemsize]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        if count:
            table.add_row(field.name, *(f"{n:,}" for n in row))
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in totals))
    return table


def _lines(stage: TrainConfig) -> list[str]:
    parts, model, optimizer = stage.images.parts, stage.model, stage.optimizer
    rates = [f"{optimizer.learning_rate:g}"]
    rates += [f"{g.learning_rate:g} for {', '.join(g.patterns)}" for g in optimizer.groups]
    return [
        f"starts from: {stage.start}" + (f", new: {', '.join(stage.fresh)}" if stage.fresh else ""),
        f"vision tokens of an image in the language model: {model.tokens_per_image(parts)}"
        f" (of {model.patches_per_image(parts)} patches)",
        f"{stage.steps} steps of {stage.batch_size} examples; learning rate {'; '.join(rates)}",
        f"parameters {stage.param_dtype}, computed in {model.compute_dtype}; mesh {stage.mesh}",
        f"data: {stage.data}",
    ]
