"""Evaluation: `python eval.py --model DIR --benchmarks pope,gqa --data playground/data/eval`.

Several --model are scored on the same questions and stand side by side in the table. The same
command goes on where it was stopped. `llava-mini benchmarks` lists what there is.
"""

import argparse
import sys
from pathlib import Path

from llava_mini_jax.errors import InputError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="DIR", help="model folder; repeatable")
    add("--benchmarks", default="digits", metavar="A,B", help="which, or: all (default: digits)")
    add("--data", type=Path, default=Path("playground/data/eval"), help="folder of their files")
    add("--out", type=Path, default=Path("out/eval"), help="folder for answers and results")
    add("--limit", type=int, help="ask only so many questions of each benchmark")
    add("--offset", type=int, default=0, help="leave out so many questions in front")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="ask part I of N only")
    add("--batch-size", type=int, default=8, help="questions that are answered together")
    add("--max-new-tokens", type=int, help="of an answer (default: the benchmark's)")
    add("--dtype", help="default: float32 on CPU, else bfloat16")
    add("--score-only", action="store_true", help="score the answers that are there")
    add("--answers", type=Path, metavar="FILE", help="score this answers file, without a model")
    add("--paper", default="LLaVA-Mini 7B", help="the paper's column to compare with")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index) - 1, int(count)


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_mini_jax.evaluation import benchmark, report
    from llava_mini_jax.evaluation.evaluate import Command, evaluate

    given = vars(arguments)
    models = tuple(given.pop("model"))
    names = given.pop("benchmarks").split(",")
    names = benchmark.all_names() if names == ["all"] else names
    results = evaluate(Command(models=models, benchmarks=tuple(names), **given))
    header, rows = report.table(results, arguments.paper)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for line in report.remarks(results):
        print(line)
    print(f"all of it: {arguments.out / 'results.md'}, {arguments.out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
