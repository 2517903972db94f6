"""How all three programs read their arguments, and what they say of wrong ones: one sentence.

cannot be read   --Parser, unboxed--> InputError: what is wrong; see: PROGRAM --help
changes nothing  --refuse-----------> InputError: which of them, and why
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn

from llava_mini_jax.errors import InputError, short

# What config.BACKBONES has: --help must not wait for JAX, which comes with that.
BACKBONES = (
    *("vicuna-7b", "vicuna-13b", "llama-3.1-8b", "llama-1.1b"),
    *("smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
    *("qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen3-4b"),
)
BACKBONES_HELP = f"{', '.join(BACKBONES[:-1])} or {BACKBONES[-1]}"


class Kind(NamedTuple):
    """A second word of a command, such as `flops` of `llava-mini profile`, with its own options."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    # What has to be set before JAX starts.
    prepare: Callable[[argparse.Namespace], None] = lambda args: None


class Parser(argparse.ArgumentParser):
    """Argparse, whose complaints are one line like all others.

    Options are not abbreviated: --image would be --images where there is no --image.
    """

    def __init__(self, **named) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=shape, allow_abbrev=False, **named)
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a number") from None


JSON = "print one JSON document instead"
VISION_TOWER = "the vision tower's folder, if MODEL has none"
COMPRESSOR = "a method to add to a LLaVA-1.5, or options of the model's own (docs/weights.md)"
VISION_TOKENS = 'tokens an image, or "all", if the model supports several (default: its own)'


def vision_tokens(text: str) -> int | str:
    """What the models that have several numbers of tokens are told of theirs."""
    try:
        return text if text == "all" else int(text)
    except ValueError:
        sentence = f'{short(text)} is neither a whole number nor "all"'
        raise argparse.ArgumentTypeError(sentence) from None


def refuse(args: argparse.Namespace, names: Iterable[str], mode: str) -> None:
    """InputError if any of these options is given, though it changes nothing in this mode."""
    values = {name: getattr(args, name, None) for name in names}
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        if value is not None and value is not False
    ]
    if given:
        changes, them = ("changes", "it") if len(given) == 1 else ("change", "them")
        raise InputError(f"{', '.join(given)} {changes} nothing {mode}; leave {them} out")


def comments(kind: type) -> dict[str, str]:
    """What the source says of each field of a dataclass: beside it, and in comment lines above it.

    Inherited fields have the comments of the class that defines them; "" where there are none.
    """
    found = dict.fromkeys((field.name for field in dataclasses.fields(kind)), "")
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        above: list[str] = []
        for line in inspect.getsource(each).splitlines():
            code, _, comment = line.partition("  # ") if "  # " in line else (line, "", "")
            name = code.partition(":")[0].strip()
            if line.strip().startswith("# "):
                above.append(line.strip()[2:])
            elif name in found and code.startswith("    ") and not code.startswith("     "):
                found[name] = " ".join([*above, comment]).strip()
                above = []
            else:
                above = []
    return found


@contextlib.contextmanager
def unboxed(program: str) -> Iterator[None]:
    """tyro's complaint as an InputError of one line.

    tyro has no public way to word it: it prints a box as wide as the terminal, and leaves.
    """
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "9999"  # else it breaks lines, and long words too
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code:
            raise InputError(f"{_sentence(said.getvalue())}; see: {program} --help") from None
        raise
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    sys.stderr.write(said.getvalue())


def _sentence(box: str) -> str:
    """What stands in tyro's box below its title, and what it takes for meant instead."""
    _, *rows = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()
    grouped = itertools.groupby((row.strip("│ ") for row in rows), key=set("─-╰╯").issuperset)
    said, *more = [list(block) for is_rule, block in grouped if not is_rule]
    meant = [
        block[1].split()[0]
        for block in more
        if block[0].startswith(("Perhaps you meant", "Arguments similar to"))
    ]
    return " ".join(said) + f" (did you mean {' or '.join(meant)}?)" * bool(meant)
