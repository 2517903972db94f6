"""The `llava-mini` command, one file a subcommand; imports every room, and only when it is needed.

    first word --> ask | benchmarks | convert | data | ..., one file each --arguments--> status
                   (of analyze, data, plan, profile a second word, a Kind with its own options)
                                     |
       InputError --> one line on stderr, status 2;  Ctrl-C --> 130;  closed pipe --> 141
       memory is full, or a disk --> one line on stderr, status 1

Answers and tables go to stdout; progress and timing go to stderr, and only if it is a terminal.
The files of the commands import JAX inside of their functions, so that --help is instant.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llava_mini_jax import compilation, environment, signals
from llava_mini_jax.arguments import Kind, Parser
from llava_mini_jax.cli import (
    analyze,
    ask,
    benchmarks,
    completion,
    convert,
    data,
    inspect,
    plan,
    profile,
    reproduce,
    serve,
    verify,
)
from llava_mini_jax.errors import InputError, memory_sentence, short

MEMORY_ADVICE = (
    "try --dtype int8, int4 or bfloat16, fewer or smaller images and frames (--max-frames), or a "
    "machine with more memory; `llava-mini ask ... --dry-run` prints what a question needs"
)
COMMANDS: dict[str, Any] = {
    "analyze": analyze,
    "ask": ask,
    "benchmarks": benchmarks,
    "completion": completion,
    "convert": convert,
    "data": data,
    "inspect": inspect,
    "plan": plan,
    "profile": profile,
    "reproduce": reproduce,
    "serve": serve,
    "verify": verify,
}

COMPUTING = ("analyze", "ask", "convert", "profile", "serve", "verify")  # in this process, with JAX
COMPILING = {  # of these, where that takes long
    *("ask", "serve", "verify", "analyze attention", "analyze compression", "analyze drop"),
    "analyze counts",
    *("profile latency", "profile memory", "profile video", "profile requests"),
}


def top_parser() -> Parser:
    """What `llava-mini` without a command understands; the commands parse their own words."""
    summaries = {name: module.SUMMARY for name, module in COMMANDS.items()}
    parser = Parser(
        prog="llava-mini",
        usage="llava-mini COMMAND ...",
        description="Images and videos as one token each for a language model, in JAX.\n\n"
        + _listed("commands:", summaries),
        epilog='example: llava-mini ask MODEL --image cat.jpg "What is this?"\n'
        "Each command has its own --help.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def command_parser(command: str, kind: str = "") -> Parser:
    """That of a command, or of one of its kinds, which shows its lines of usage and examples."""
    module = COMMANDS[command]
    chosen = kinds_of(command).get(kind)
    name = f"llava-mini {command} {kind}".rstrip()
    summary = chosen.summary if chosen else module.SUMMARY
    listed = {word: each.summary for word, each in kinds_of(command).items() if not chosen}
    usage = [line.strip() for line in module.USAGE.splitlines() if name in line]
    example = [x for x in module.EXAMPLE.splitlines() if name in x or "llava-mini" not in x]
    parser = Parser(
        prog=name,
        usage="\n       ".join(usage),
        description=f"{summary[0].upper()}{summary[1:]}.\n\n" + _listed("", listed),
        epilog="\n".join(example),
    )
    add_arguments = chosen.add_arguments if chosen else getattr(module, "add_arguments", None)
    if add_arguments:
        add_arguments(parser)
    if f"{command} {kind}".rstrip() in COMPILING:
        parser.add_argument("--compilation-cache", metavar="DIR", help=compilation.HELP)
    if module is completion:  # it completes all of them, and must not import this file
        parser.set_defaults(parsers=all_parsers)
    return parser


def all_parsers() -> dict[tuple[str, ...], Parser]:
    """Those of commands and of their kinds, by the words that lead to them."""
    found = {}
    for command in COMMANDS:
        found[(command,)] = command_parser(command)
        found |= {(command, kind): command_parser(command, kind) for kind in kinds_of(command)}
    return found


def kinds_of(command: str) -> Mapping[str, Kind]:
    return getattr(COMMANDS[command], "KINDS", {})


def _listed(title: str, summaries: Mapping[str, str]) -> str:
    width = max(map(len, summaries), default=0)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
    return "\n".join([title, *lines] if title else lines)


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
    if not argv or argv[0] not in COMMANDS:
        return _without_command(argv)
    command, *words = argv
    kinds = kinds_of(command)
    kind = words.pop(0) if words and words[0] in kinds else ""
    parser = command_parser(command, kind)
    if kinds and not kind:
        parser.parse_known_args(words)  # leaves after --help
        given = f"not {short(words[0])}" if words else "but nothing is given"
        parser.error(f"expected {', '.join(kinds)} after llava-mini {command}, {given}")
    # Intermixed: the question may stand behind the options that follow the model.
    args = parser.parse_intermixed_args(words)
    if kind:
        kinds[kind].prepare(args)
    if command in COMPUTING:
        environment.check()
    if hasattr(args, "compilation_cache"):
        compilation.keep_programs(args.compilation_cache, "llava-mini")
    return (kinds[kind] if kind else COMMANDS[command]).run(args)


def _without_command(argv: Sequence[str]) -> int:
    args, _ = top_parser().parse_known_args(argv)
    if not args.version:
        given = "no command is given" if not args.command else f'"{args.command}" is not a command'
        raise InputError(f"{given}; the commands are {', '.join(COMMANDS)}")
    import llava_mini_jax

    print(f"llava-mini {llava_mini_jax.__version__}")
    return 0
