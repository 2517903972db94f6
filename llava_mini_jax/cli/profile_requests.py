"""`llava-mini profile requests`: requests a second of the engine, beside batches."""

import argparse

from llava_mini_jax.arguments import Kind
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import waiting

USAGE = "llava-mini profile requests MODEL [--requests N] [--slots N] [options]"
EXAMPLE = "llava-mini profile requests MODEL --requests 64 --slots 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model's folder, or a name on the Hugging Face hub")
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16, int8")
    add("--requests", type=int, default=64, metavar="N", help="default: 64")
    add("--slots", type=int, default=8, metavar="N", help="answered at a time (default: 8)")
    add("--new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="times measured (default: 5)")


def run(args: argparse.Namespace) -> int:
    least = {"requests": 1, "slots": 1, "new_tokens": 4, "repeats": 1}
    for option, minimum in least.items():
        if getattr(args, option) < minimum:
            raise InputError(
                f"--{option.replace('_', '-')} is {getattr(args, option)}; give {minimum} or more"
            )
    from llava_mini_jax.cost import throughput
    from llava_mini_jax.inference.model import load

    with waiting(f"loading {args.model}"):
        model = load(args.model, dtype=args.dtype)
    with waiting("measuring"):
        examples, settings = throughput.mixed(model, args.requests, args.new_tokens)
        speed = throughput.measure(model, examples, settings, args.slots, args.repeats)
    print(*throughput.lines(speed, args.slots), sep="\n")
    return 0


KIND = Kind("requests a second, beside batches one after another", add_arguments, run)
