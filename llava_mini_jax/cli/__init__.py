"""The `llava-mini` command, one file a subcommand; imports every room, and only when it is needed.

    first word --> ask | benchmarks | convert | data | ..., one file each --arguments--> status
                                     |
       InputError --> one line on stderr, status 2;  Ctrl-C --> 130;  closed pipe --> 141
       memory is full, or a disk --> one line on stderr, status 1

Answers and tables go to stdout; progress and timing go to stderr, and only if it is a terminal.
The files of the commands import JAX inside of their functions, so that --help is instant.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from llava_mini_jax import environment, signals
from llava_mini_jax.cli import (
    analyze,
    ask,
    benchmarks,
    convert,
    data,
    inspect,
    profile,
    reproduce,
    verify,
)
from llava_mini_jax.errors import InputError, memory_sentence

MEMORY_ADVICE = (
    "try --dtype int8 or bfloat16, fewer or smaller pictures and frames (--max-frames), or a "
    "machine with more memory; `llava-mini ask ... --dry-run` tells what a question takes"
)
COMMANDS = {
    "analyze": analyze,
    "ask": ask,
    "benchmarks": benchmarks,
    "convert": convert,
    "data": data,
    "inspect": inspect,
    "profile": profile,
    "reproduce": reproduce,
    "verify": verify,
}

COMPUTING = ("analyze", "ask", "convert", "profile", "verify")  # in this process, with JAX


class Parser(argparse.ArgumentParser):
    """Argparse, whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def top_parser() -> Parser:
    """What `llava-mini` without a command understands; the commands parse their own words."""
    width = max(map(len, COMMANDS))
    listed = [f"  {name:<{width}}  {module.SUMMARY}" for name, module in COMMANDS.items()]
    parser = Parser(
        prog="llava-mini",
        usage="llava-mini COMMAND ...",
        description="Images and videos as one token each in front of a language model, in JAX.\n\n"
        + "\n".join(["commands:", *listed]),
        epilog='example: llava-mini ask MODEL --image cat.jpg "What is this?"\n'
        "Each command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def command_parser(name: str) -> Parser:
    module = COMMANDS[name]
    parser = Parser(
        prog=f"llava-mini {name}",
        usage=module.USAGE,
        description=f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}.",
        epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Without `argv` the process ends with it."""
    if argv is None:
        signals.run(lambda: main(sys.argv[1:]), "llava-mini: stopped")
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"llava-mini: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at its end; there must be something to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        sentence = memory_sentence(error, MEMORY_ADVICE)
        if sentence is None and not isinstance(error, OSError):
            raise
        # Else a full disk, a folder that may not be written.
        print(f"llava-mini: {sentence or error}", file=sys.stderr)
        return 1


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        # Intermixed: the question may stand behind the options that follow the model.
        args = command_parser(argv[0]).parse_intermixed_args(argv[1:])
        if argv[0] in COMPUTING:
            environment.check()
        return COMMANDS[argv[0]].run(args)
    args, _ = top_parser().parse_known_args(argv)
    if not args.version:
        given = "no command is given" if not args.command else f'"{args.command}" is no command'
        raise InputError(f"{given}; the commands are {', '.join(COMMANDS)}")
    import llava_mini_jax

    print(f"llava-mini {llava_mini_jax.__version__}")
    return 0
