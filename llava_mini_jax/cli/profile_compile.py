"""`llava-mini profile compile`: what a compiler makes of a run or a model, for chips elsewhere.

CONFIG of train.py --> one training step --.
NAME, model folder --> programs of answers +--compile for a slice of chips--> memory, products,
                                              traffic, attention, collectives, a bound on its time
"""

import argparse
from pathlib import Path
from typing import Any

from llava_mini_jax import environment
from llava_mini_jax.arguments import BACKBONES_HELP, JSON, Kind, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import as_json, print_json, waiting

USAGE = """llava-mini profile compile CONFIG --chip CHIP --slice N [options]
llava-mini profile compile MODEL --chip CHIP [--program NAME...] [options]"""
EXAMPLE = """llava-mini profile compile configs/stage2_vicuna_7b.py --chip h100 --slice 8
  llava-mini profile compile configs/stage2_vicuna_7b.py --chip v5e --slice 8x8 --accumulate 2
  llava-mini profile compile llama-3.1-8b --chip h100 --program decode --slots 12288"""
_OF_TRAINING = ("accumulate", "fused", "remat", "stage")
_OF_ANSWERS = ("program", "slots", "baseline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "what",
        metavar="CONFIG | MODEL",
        help=f"a config file of train.py; or {BACKBONES_HELP}, or a model folder or hub name",
    )
    add("--chip", metavar="CHIP", help="v5e, v5p, v6e or h100")
    add(
        "--slice",
        metavar="N",
        help="a TPU topology, such as 8x8, or a number of GPUs (default: 1)",
    )
    add(
        "--mesh",
        metavar="AXES",
        help="such as fsdp=4,tensor=2 (default: the config's, if it fits)",
    )
    add("--length", type=int, metavar="S", help="positions (default: the longest; model: 128)")
    add("--rows", type=int, metavar="B", help="rows of a step, or answers at a time (default: 1)")
    add("--images", type=int, default=1, metavar="N", help="images or frames (default: 1)")
    add("--layers", type=int, metavar="N", help="LLM layers; fewer compile sooner")
    add("--dtype", metavar="TYPE", help="dtype of the parameters; for a model also int8 and int4")
    add("--attention", metavar="NAME", help="auto (default), xla, cudnn or splash")
    add("--option", action="append", metavar="K=V", help="a compiler option of XLA")
    add("--json", action="store_true", help=JSON)
    add("--report", metavar="FILE", help="also write the JSON document to FILE")
    add("--text", metavar="FOLDER", help="folder for the compiled programs' text")
    add = parser.add_argument_group("for a training step").add_argument
    add("--stage", metavar="NAME", help="stage, if the config has several")
    add("--accumulate", type=int, metavar="N", help="micro-batches (default: the config's)")
    add("--fused", type=int, metavar="F", help="text tokens that are fused (default: all)")
    add("--remat", metavar="KIND", help="recompute layers: none, matmuls, attention or full")
    add = parser.add_argument_group("for a model").add_argument
    add("--program", nargs="+", metavar="NAME", help="programs, such as decode (default: all)")
    add("--slots", type=int, metavar="S", help="slots of the KV cache (default: 640)")
    add("--baseline", action="store_true", help="LLaVA-1.5 of the model's own parts instead")


def prepare(args: argparse.Namespace) -> None:
    environment.compile_for_absent()


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax.cli import profile_compiled
    from llava_mini_jax.cli import profile_programs as programs

    if not args.chip:
        raise InputError("no chip is given; give --chip v5e, v5p, v6e or h100")
    for option in ("length", "rows", "images", "layers", "accumulate", "fused", "slots"):
        given = getattr(args, option)
        if given is not None and given < 1:
            raise InputError(f"--{option} is {given}; give 1 or more")
    training = args.what.endswith(".py")
    if training:
        refuse(args, _OF_ANSWERS, "of a training step")
    else:
        refuse(args, _OF_TRAINING, "of a model that answers")
    options = _options(args.option or [])
    machine = programs.machine(args.chip, args.slice)
    if training:
        jobs = [programs.training_step(args, machine)]
    else:
        jobs = programs.answers(args, machine)
    found: list[dict[str, Any]] = []
    for job in jobs:
        with waiting(f"compiling {job.name}"):
            result = programs.compiled(job, machine, options, args.text)
        if not args.json:
            print(*profile_compiled.lines(result), "", sep="\n")
        found.append(profile_compiled.as_json(result))
        if args.report:  # after each: the next one may take minutes
            Path(args.report).write_text(as_json(found, indent=2) + "\n")
    if args.json:
        print_json(found)
    return 0


def _options(given: list[str]) -> dict[str, str]:
    for option in given:
        if not option.partition("=")[2]:
            raise InputError(f'--option has "{option}"; give one as name=value')
    return dict(option.split("=", 1) for option in given)


KIND = Kind(
    "compile for absent TPUs and GPUs: memory, traffic, time",
    add_arguments,
    run,
    prepare,
)
