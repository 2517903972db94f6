"""`llava-mini benchmarks`: what eval.py can score, and which of its files are there.

names, metrics and the paper's figures need no data; with --data each file is looked for
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import JSON, refuse
from llava_mini_jax.terminal import print_json

if TYPE_CHECKING:
    from llava_mini_jax.evaluation.benchmark import Benchmark

SUMMARY = "list the benchmarks of eval.py and the files they need"
USAGE = "llava-mini benchmarks [NAME ...] [--data DIR] [--json]"
EXAMPLE = """examples:
  llava-mini benchmarks
  llava-mini benchmarks pope gqa --data playground/data/eval"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, with their files")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the files")
    parser.add_argument("--json", action="store_true", help=JSON)


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax.evaluation.benchmark import all_names, find

    chosen = [find(name) for name in args.names or all_names()]
    if args.names and not any(benchmark.files for benchmark in chosen):
        refuse(args, ["data"], f"with {', '.join(args.names)}, which have no files")
    if args.json:
        print_json([_described(benchmark, args.data) for benchmark in chosen])
        return 0
    if not args.names and args.data is None:
        _print_table(chosen)
        return 0
    for benchmark in chosen:
        print(f"{benchmark.name}: {benchmark.title}, {benchmark.metric}")
        for file, source in benchmark.files.items():
            there = {None: "", True: "there    ", False: "missing  "}[
                _is_there(benchmark, file, args.data)
            ]
            print(f"  {there}{benchmark.folder}/{file}: {source}")
    return 0


def _is_there(benchmark: "Benchmark", file: str, data: Path | None) -> bool | None:
    """None where nobody has said where to look."""
    return None if data is None else any((data / benchmark.folder).glob(file))


def _described(benchmark: "Benchmark", data: Path | None) -> dict[str, Any]:
    files = {
        f"{benchmark.folder}/{file}": {"from": source, "there": _is_there(benchmark, file, data)}
        for file, source in benchmark.files.items()
    }
    names = ("name", "title", "metric", "max_new_tokens")
    about = {name: getattr(benchmark, name) for name in names}
    return about | {"paper": dict(benchmark.paper), "files": files}


def _print_table(benchmarks: "Sequence[Benchmark]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from llava_mini_jax.evaluation.benchmark import MODELS

    table = Table(box=box.SIMPLE)
    for column in ("name", "benchmark"):
        table.add_column(column, no_wrap=True)
    for model in MODELS:
        table.add_column("\n".join(model.split(" ", 1)), justify="right")
    for benchmark in benchmarks:
        figures = (benchmark.paper.get(model) for model in MODELS)
        shown = ("" if value is None else f"{value:g}" for value in figures)
        table.add_row(benchmark.name, benchmark.title, *shown)
    Console().print(table)
    print(
        "figures are the paper's, tables 1-5; `llava-mini benchmarks NAME` tells metric and files"
    )
