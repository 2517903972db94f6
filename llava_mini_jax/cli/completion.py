"""`llava-mini completion`: with what a shell completes commands, options, names and files.

parsers of all commands --one tree--> shtab --> a script for bash, zsh or fish, to stdout
"""

import argparse
import importlib.util
from collections.abc import Mapping
from typing import Any

from llava_mini_jax.arguments import BACKBONES, BACKBONES_HELP, Parser
from llava_mini_jax.errors import InputError

SUMMARY = "print the completion script for bash, zsh or fish"
USAGE = "llava-mini completion SHELL"
EXAMPLE = """examples, for good:
  echo 'eval "$(llava-mini completion bash)"' >> ~/.bashrc
  llava-mini completion zsh > ~/.zfunc/_llava-mini       # a folder of your fpath
  llava-mini completion fish > ~/.config/fish/completions/llava-mini.fish"""

SHELLS = ("bash", "zsh", "fish")
# What stands for an option's value, where that is found on disk.
FOLDERS = ("MODEL", "FOLDER", "DIR", "CASE", "OUT")
FILES = ("FILE", "CONFIG", "CONFIG.py", "CONFIG | MODEL", "SOURCE", "OUT.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise InputError(
            "llava-mini completion needs shtab: pip install 'llava-mini-jax[completion]'"
        )
    import shtab

    print(shtab.complete(tree(args.parsers()), args.shell))
    return 0


def tree(parsers: Mapping[tuple[str, ...], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Parsers by their words as one, in which argparse would find them: shtab reads it.

    Those of one word come before those of two that begin with it.
    """
    top = Parser(prog="llava-mini")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    hung: dict[tuple[str, ...], argparse.ArgumentParser] = {(): top}
    below: dict[tuple[str, ...], Any] = {}
    for words, parser in parsers.items():
        before = words[:-1]
        if before not in below:
            below[before] = hung[before].add_subparsers()
        _complete_values(parser)
        summary = (parser.description or "").partition("\n")[0]
        options = {"help": summary, "parents": [parser], "add_help": False}
        hung[words] = below[before].add_parser(words[-1], **options)
    return top


def _complete_values(parser: argparse.ArgumentParser) -> None:
    import shtab

    for action in parser._actions:
        if action.help == BACKBONES_HELP:
            action.choices = BACKBONES
        elif action.metavar in (*FOLDERS, *FILES):
            kind = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
            vars(action)["complete"] = kind  # an attribute that only shtab knows
