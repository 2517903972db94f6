"""`llava-mini data packing`: what rows of several conversations would make of a run, beforehand.

training config --what its samples need--> ways to lay out an epoch --> a table
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from llava_mini_jax.arguments import JSON
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import print_json

if TYPE_CHECKING:
    from llava_mini_jax.training.stages import TrainConfig

_WINDOW = 4096  # conversations: a second of planning, and rows that are full to 99 %
_SPARE = (1.2, 1.5, 2.0)  # room for images, of what full rows have on average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="CONFIG.py", help="a training config")
    add("--stage", metavar="NAME", help="stage, if the config has several (default: the last)")
    add(
        "--images",
        type=int,
        nargs="+",
        metavar="N",
        help="images a row, to compare (default: 1.2, 1.5 and 2 times those of full rows)",
    )
    add("--window", type=int, metavar="N", help="conversations (default: the config's, or 4096)")
    add("--json", action="store_true", help=JSON)


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax.data.batches.pipeline import Encoder
    from llava_mini_jax.training import feed, packing_plan
    from llava_mini_jax.training.run_inputs import make_tokenizer

    stage = _stage(args.source, args.stage)
    window = stage.packing.window or _WINDOW if args.window is None else args.window
    layout = feed.layout_of(stage)
    encode = Encoder(make_tokenizer(stage), stage.prompt, stage.images)
    needs = feed.count_needs(stage, feed.open_data(stage.data), encode, layout)
    rows = max(1, int(needs.positions.clip(max=layout.max_length).sum()) // layout.max_length)
    each = int(needs.images.sum()) / rows
    found = {}
    for most in args.images or sorted({max(1, round(each * spare)) for spare in _SPARE}):
        packing = dataclasses.replace(stage.packing, window=window, images=most)
        ways = packing_plan.compare(dataclasses.replace(stage, packing=packing), needs)
        # The other way is the same each time.
        found |= {name if name != packing_plan.PACKED else f"{name}, {most} images": way
                  for name, way in ways.items()}  # fmt: skip
    if args.json:
        print_json([{"way": name} | way._asdict() for name, way in found.items()])
        return 0
    print(
        f"{stage.name}: {len(needs.positions):,} conversations of {needs.positions.mean():.0f}"
        f" positions on average; full rows of {layout.max_length} would have {each:.3g} images"
    )
    print(f"{'':<28} {'rows':>9} {'filled':>7} {'images filled':>13} {'GFLOP a conversation':>21}")
    for name, way in found.items():
        print(
            f"{name:<28} {way.rows:9,} {way.positions:7.1%} {way.images:13.1%}"
            f" {way.flops / 1e9:21.4g}"
        )
    return 0


def _stage(path: str, name: str | None) -> "TrainConfig":
    from llava_mini_jax.training.stages import load_config, stages_of

    if Path(path).suffix != ".py":
        raise InputError(f"data packing reads a training config (.py), not {path}")
    stages = {stage.name: stage for stage in stages_of(load_config(path))}
    if name is not None and name not in stages:
        raise InputError(f"{path} has no stage {name}; give one of {', '.join(stages)}")
    return stages[name or list(stages)[-1]]
