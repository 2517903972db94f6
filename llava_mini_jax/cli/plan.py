"""`llava-mini plan`: what a video or a training run takes of a device, from shapes alone.

NAME of a published shape --> video: positions, bytes and passes of a question about many frames
CONFIG of train.py --> training: its stages on known hardware, as a Markdown table
"""

import argparse
import dataclasses
from pathlib import Path

from llava_mini_jax.arguments import BACKBONES_HELP, JSON, Kind
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import print_json

SUMMARY = "estimate the memory of a long video, or of a training config on known hardware"
USAGE = """llava-mini plan video NAME [options]
llava-mini plan training CONFIG [CONFIG...]"""
EXAMPLE = """examples:
  llava-mini plan video llama-3.1-8b --frames 10800 --dtype int8
  llava-mini plan training configs/stage1_vicuna_7b.py configs/stage2_vicuna_7b.py

of a model folder: llava-mini ask MODEL --video FILE --dry-run
for the config's own mesh: python train.py CONFIG --dry-run"""


def _of_video(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help=BACKBONES_HELP)
    add("--frames", type=int, default=10_800, metavar="N", help="default: 10800, three hours")
    add("--dtype", default="bfloat16", metavar="TYPE", help="of the weights (default: bfloat16)")
    add("--chunk", type=int, default=8, metavar="N", help="frames a chunk (default: 8)")
    add("--json", action="store_true", help=JSON)


def _of_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="a config file of train.py")
    parser.add_argument("--json", action="store_true", help=JSON)


def _video(args: argparse.Namespace) -> int:
    from llava_mini_jax.cost.video_plan import published

    for name, number, least in (("--frames", args.frames, 0), ("--chunk", args.chunk, 1)):
        if number < least:
            raise InputError(f"{name} is {number}; give {least} or more")
    planned = published(args.name, args.frames, dtype=args.dtype, chunk=args.chunk)
    print_json(planned.as_json()) if args.json else print(*planned.lines(), sep="\n")
    return 0


def _training(args: argparse.Namespace) -> int:
    from llava_mini_jax.training.dry_run import hardware, hardware_table
    from llava_mini_jax.training.stages import load_config, stages_of

    stages = [
        dataclasses.replace(stage, name=Path(path).stem)
        for path in args.configs
        for stage in stages_of(load_config(path))
    ]
    rows = list(hardware(stages))
    print_json(rows) if args.json else print(*hardware_table(rows), sep="\n")
    return 0


KINDS = {
    "video": Kind("positions, memory and passes of a question about a video", _of_video, _video),
    "training": Kind("memory of each stage on known hardware", _of_training, _training),
}
