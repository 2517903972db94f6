"""`llava-mini profile`: what a model costs in FLOPs, time and memory.

MODEL folder, or --abstract NAME and sizes --> flops: by formula, XLA, and the paper's rule
                                           --> latency: of the model and LLaVA-1.5, in turns
                                           --> memory: weights, keys and values, peak
                                           --> video: profile_video.py
                                           --> requests: profile_requests.py
                                           --> compile: profile_compile.py
                                           --> compressors: profile_compressors.py
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from llava_mini_jax.arguments import BACKBONES_HELP, JSON, VISION_TOWER, Kind, refuse
from llava_mini_jax.cli import (
    profile_compile,
    profile_compressors,
    profile_requests,
    profile_video,
)
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import print_json, waiting

SUMMARY = "count FLOPs, measure latency and memory, and compare with LLaVA-1.5 and the paper"
USAGE = f"""llava-mini profile flops [MODEL | --abstract NAME] [options]
llava-mini profile latency MODEL | --abstract NAME [options]
llava-mini profile memory MODEL | --abstract NAME [options]
{profile_video.USAGE}
{profile_requests.USAGE}
{profile_compile.USAGE}
{profile_compressors.USAGE}"""
EXAMPLE = f"""examples:
  llava-mini profile flops
  llava-mini profile flops --tokens 1 4 16 64 --resolution 336 672 --xla
  llava-mini profile latency MODEL
  llava-mini profile latency --abstract vicuna-7b --tokens 1 4 16 64 --dtype bfloat16
  llava-mini profile latency --abstract llama-3.1-8b --llm-layers 4 --dtype float32 int8
  llava-mini profile memory --abstract llama-3.1-8b --frames 10000
  {profile_video.EXAMPLE}
  {profile_requests.EXAMPLE}
  {profile_compile.EXAMPLE}
  {profile_compressors.EXAMPLE}"""


# The least that an option may be.
LEAST = {"tokens": 1, "layers": 0, "resolution": 1, "frames": 1, "llm_layers": 1}
LEAST |= {"vision_layers": 1}
SHAPE_OPTIONS = ("tokens", "layers", "llm_layers", "vision_layers")


def _of_shape(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)
    add("--json", action="store_true", help=JSON)
    add("--resolution", type=int, nargs="+", metavar="PX", help="336, 672, ... (default: 336)")
    add = parser.add_argument_group("without a folder").add_argument
    add("--abstract", metavar="NAME", help=BACKBONES_HELP)
    add("--tokens", type=int, nargs="+", metavar="Q", help="tokens an image (default: 1)")
    add("--layers", type=int, nargs="+", metavar="N", help="pre-fusion layers (default: 4)")


def _of_flops(parser: argparse.ArgumentParser) -> None:
    _of_shape(parser)
    add = parser.add_argument
    add("--text", type=int, metavar="T", help="text tokens (default: 43)")
    add("--xla", action="store_true", help="add XLA's own count, which takes seconds a row")


def _of_latency(parser: argparse.ArgumentParser) -> None:
    _of_shape(parser)
    _of_request(parser.add_argument_group("the request").add_argument, several=True)
    add = parser.add_argument_group("without a folder").add_argument
    add("--llm-layers", type=int, metavar="N", help="layers of the language model (default: all)")
    add("--vision-layers", type=int, metavar="N", help="layers of the tower to run (default: 23)")
    add = parser.add_argument
    add("--follow-up", action="store_true", help="measure a follow-up question too")
    add("--repeats", type=int, default=20, metavar="N", help="repetitions (default: 20)")


def _of_memory(parser: argparse.ArgumentParser) -> None:
    _of_shape(parser)
    add = parser.add_argument
    add("--peak", action="store_true", help="compile (on accelerators: run) for the peak")
    group = parser.add_argument_group("the request; all but --frames need --peak")
    _of_request(group.add_argument)


def _of_request(add: Callable[..., Any], *, several: bool = False) -> None:
    add("--frames", type=int, default=1, metavar="N", help="images or frames (default: 1)")
    add("--text", type=int, metavar="T", help="text tokens (default: 43)")
    add("--new-tokens", type=int, metavar="N", help="tokens of the answer (default: 32)")
    if several:
        add(
            "--dtype",
            nargs="+",
            metavar="TYPE",
            help="float32 (default on CPU), bfloat16, int8, int4",
        )
    else:
        add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16")


def _run(kind: str, args: argparse.Namespace) -> int:
    if not args.model:
        refuse(args, ["vision_tower"], "without MODEL")
    elif args.abstract or any(getattr(args, option, None) for option in SHAPE_OPTIONS):
        raise InputError(
            f"{args.model} has its own shape; give either a model, or --abstract, --tokens and"
            " --layers"
        )
    for option, least in LEAST.items():
        given = getattr(args, option, None)
        for number in [given] if isinstance(given, int) else given or []:
            if number < least:
                raise InputError(f"--{option.replace('_', '-')} is {number}; give {least} or more")
    with waiting("starting"):
        from llava_mini_jax.cli.profile_costs import MEASURES
    # It has bars of its own.
    result = MEASURES[kind](args)
    if args.json:
        print_json(result)
    return 0


def _kind(name: str, summary: str, add_arguments: Callable) -> Kind:
    return Kind(summary, add_arguments, functools.partial(_run, name))


KINDS = {
    "flops": _kind("flops", "FLOPs by formula, XLA, and the paper's rule", _of_flops),
    "latency": _kind("latency", "milliseconds a token, beside LLaVA-1.5", _of_latency),
    "memory": _kind("memory", "bytes of weights, keys and values, and the peak", _of_memory),
    "video": profile_video.KIND,
    "requests": profile_requests.KIND,
    "compile": profile_compile.KIND,
    "compressors": profile_compressors.KIND,
}
