"""Evaluation: `python eval.py --model DIR [--model DIR ...] --benchmarks digits [--limit N]`.

Several models are scored on the same questions and stand side by side in the table.
"""

import argparse
import json
import sys
from pathlib import Path

from llava_mini_jax.errors import InputError

BENCHMARKS = ("digits",)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="model folder; repeatable")
    parser.add_argument("--benchmarks", default="digits", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--limit", type=int, default=250, help="questions of each kind")
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="folder for results")
    parser.add_argument("--dtype", default=None, help="default: float32 on CPU, else bfloat16")
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.benchmarks.split(","):
            if name not in BENCHMARKS:
                raise InputError(f'benchmark "{name}" is unknown; known: {", ".join(BENCHMARKS)}')
        if arguments.limit < 1:
            raise InputError(f"--limit is {arguments.limit}; give 1 or more")
        run_digits(arguments)
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_digits(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    import llava_mini_jax
    from llava_mini_jax.evaluation import digits

    table = Table(title="held-out digits: exactly right answers, %")
    table.add_column("question kind")
    columns: list[dict[str, digits.Score]] = []
    report = []
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {arguments.out} cannot be made ({error}): give another") from error
    for folder in arguments.model:
        model = llava_mini_jax.load(folder, dtype=arguments.dtype)
        tokens = model.bundle.model.tokens_per_image(model.bundle.images.parts)
        asked = digits.questions(model.bundle.images.size, arguments.limit)
        answers = digits.ask(model, asked)
        columns.append(digits.score(asked, answers))
        table.add_column(f"{folder}\n{tokens} vision token{'s' * (tokens > 1)}", justify="right")
        scores = {kind: {"right": s.right, "asked": s.asked} for kind, s in columns[-1].items()}
        report.append({"model": str(folder), "vision_tokens": tokens, "scores": scores})
    for kind in columns[0]:
        cells = [
            f"{100 * c[kind].accuracy:.1f} ± {100 * c[kind].standard_error:.1f}" for c in columns
        ]
        table.add_row(kind, *cells)
    Console().print(table)
    (arguments.out / "digits.json").write_text(json.dumps(report, indent=2) + "\n")
    digits.draw_examples(asked, answers, arguments.out / "digits.png")
    page = arguments.out / "page.png"
    digits.save_page(asked[0], page)
    print(f"scores: {arguments.out / 'digits.json'}   examples: {arguments.out / 'digits.png'}")
    print(f'try: llava-mini ask {arguments.model[-1]} --image {page} "{asked[0].text}"')


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
