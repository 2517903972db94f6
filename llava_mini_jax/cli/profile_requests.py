"""`llava-mini profile requests`: requests a second of the engine, beside batches."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from llava_mini_jax.arguments import BACKBONES_HELP, JSON, Kind, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import loading, print_json, waiting

if TYPE_CHECKING:
    from llava_mini_jax.inference.model import Model

USAGE = "llava-mini profile requests MODEL | --abstract NAME [options]"
EXAMPLE = "llava-mini profile requests MODEL --requests 64 --slots 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16, int8, int4")
    add("--requests", type=int, default=64, metavar="N", help="default: 64")
    add("--slots", type=int, default=8, metavar="N", help="answers decoded together (default: 8)")
    add("--new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    add("--json", action="store_true", help=JSON)
    add = parser.add_argument_group("without a folder, with random weights").add_argument
    add("--abstract", metavar="NAME", help=BACKBONES_HELP)
    add("--llm-layers", type=int, metavar="N", help="layers of the language model (default: all)")
    add("--vision-layers", type=int, metavar="N", help="layers of the tower to run (default: 23)")


def run(args: argparse.Namespace) -> int:
    least = {"requests": 1, "slots": 1, "new_tokens": 4, "repeats": 1}
    least |= {"llm_layers": 1, "vision_layers": 1}
    for option, minimum in least.items():
        given = getattr(args, option)
        if given is not None and given < minimum:
            raise InputError(
                f"--{option.replace('_', '-')} is {getattr(args, option)}; give {minimum} or more"
            )
    if bool(args.model) == bool(args.abstract):
        raise InputError("give a MODEL, or --abstract NAME for random weights of its shape")
    if args.model:
        refuse(args, ["llm_layers", "vision_layers"], "with MODEL")
    from llava_mini_jax.cost import throughput

    model = _model(args)
    with waiting("measuring"):
        examples, settings = throughput.mixed(model, args.requests, args.new_tokens)
        speed = throughput.measure(model, examples, settings, args.slots, args.repeats)
    if args.json:
        print_json(dataclasses.asdict(speed) | {"slots": args.slots})  # seconds of each repeat
    else:
        print(*throughput.lines(speed, args.slots), sep="\n")
    return 0


def _model(args: argparse.Namespace) -> "Model":
    from llava_mini_jax.cli.profile_costs import candidates
    from llava_mini_jax.cost.latency import askable
    from llava_mini_jax.inference.model import load

    if args.model:
        with loading(args.model) as watch:
            return load(args.model, dtype=args.dtype, watch=watch)
    shape = argparse.Namespace(
        **{**vars(args), "tokens": None, "layers": None, "resolution": None, "vision_tower": None}
    )
    layers = {"llm_layers": args.llm_layers, "vision_layers": args.vision_layers}
    with waiting(f"making {args.abstract}"):
        found, _ = candidates(shape, [args.dtype], **layers)
    # Beside LLaVA-1.5, which is the first.
    return askable(list(found.values())[-1])


KIND = Kind("requests a second, compared with static batches", add_arguments, run)
