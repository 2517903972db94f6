"""Loss on data that nothing is learnt from, measured while a stage runs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llava_mini_jax.data.sets.packing import NO_PACKING
from llava_mini_jax.training import feed
from llava_mini_jax.training.loss import mean
from llava_mini_jax.training.metrics import at_counts
from llava_mini_jax.training.stages import TrainConfig
from llava_mini_jax.training.step import TrainState, heldout_sums


def evaluator(
    stage: TrainConfig, tokenizer: Any, workdir: epath.Path, first_step: int
) -> Callable[[int, TrainState], dict[str, float]]:
    """A function of (step, state) that gives "loss" and "token_accuracy" per supervised token, NaN
    where none is.

    It sees the same batches every time. Broken samples go to workdir/quarantine-heldout.jsonl.
    """
    cfg = stage.heldout
    if cfg is None:
        return lambda step, state: {}
    source = feed.open_data(cfg.data)
    path = workdir / "quarantine-heldout.jsonl"
    quarantine = feed.open_quarantine(stage, path, len(source), first_step)
    # A row for each: its loss is the same, and its conversations stay in their order.
    stage = dataclasses.replace(stage, data=cfg.data, packing=NO_PACKING)
    rows = stage.batch_size // stage.accumulate  # what fits in training fits here

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        batches = feed.batches(stage, source, tokenizer, rows=rows, first_step=0)
        seen = []
        for _ in range(cfg.batches * stage.accumulate):
            arrival = feed.receive(batches, stage.prompt.padding_side)
            quarantine.add(step, arrival.rejected)
            seen.append(
                heldout_sums(state, arrival.batch, cfg=stage.model, loss_chunk=stage.loss_chunk)
            )
        # Read only now: no batch has waited for the one before.
        total = jax.tree.map(lambda *sums: sum(map(float, sums)), *seen)
        if not total["tokens"]:  # a mean of nothing would read as a perfect 0
            return {"loss": math.nan, "token_accuracy": math.nan}
        return {
            "loss": float(mean(total["cross_entropy"], total["tokens"])),
            "token_accuracy": float(mean(total["right_tokens"], total["tokens"])),
            **at_counts([total], [total]),
        }

    return evaluate
