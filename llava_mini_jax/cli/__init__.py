"""The `llava-mini` command.

    arguments --parser--> ask | convert | inspect | verify, one file each --> exit status
                                     |
               InputError --> one line on stderr, status 2;  Ctrl-C --> 130;  closed pipe --> 141

Answers and tables go to stdout; progress and timing go to stderr, and only if it is a terminal.
The files of the commands import JAX inside of their functions, so that --help is instant.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from llava_mini_jax.cli import ask, convert, inspect, verify
from llava_mini_jax.errors import InputError

COMMANDS = {"ask": ask, "convert": convert, "inspect": inspect, "verify": verify}


class Parser(argparse.ArgumentParser):
    """Argparse, whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def make_parser() -> Parser:
    parser = Parser(
        prog="llava-mini",
        description="Images and videos as one token each in front of a language model, in JAX.",
        epilog="example: llava-mini ask MODEL --image cat.jpg 'What is this?'",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}.",
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
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


def _run(argv: Sequence[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.version:
        import llava_mini_jax

        print(f"llava-mini {llava_mini_jax.__version__}")
        return 0
    if args.command is None:
        parser.error("a command is missing")
    return COMMANDS[args.command].run(args)
