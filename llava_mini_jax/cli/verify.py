"""`llava-mini verify`: recorded outputs of the release against this code, array by array."""

import argparse
import sys
from pathlib import Path

from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import waiting

SUMMARY = "compare this code with recorded outputs, array by array"
USAGE = "llava-mini verify CASE [CASE...]"
EXAMPLE = """example:
  llava-mini verify golden/image_c1 golden/video_f5

exit status: 0 all arrays agree, 1 some do not, 2 a case cannot be read"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases",
        nargs="+",
        metavar="CASE",
        help="folder with model/, inputs.npz, outputs.npz and case.json",
    )


def run(args: argparse.Namespace) -> int:
    status = arrays = 0
    failed: list[str] = []
    for case in args.cases:
        print(f"== {case}", flush=True)
        try:
            lines, bad = _verify(Path(case))
        except InputError as error:
            print(f"llava-mini: {error}", file=sys.stderr)
            status = 2
            continue
        except Exception as error:  # a fault of ours; the other cases still tell something
            lines, bad = [f"FAILED with {type(error).__name__}: {error}"], ["the whole case"]
        print(*lines, sep="\n", flush=True)
        arrays += len(lines)
        failed += [f"{case}: {name}" for name in bad]
    print(f"{len(args.cases)} cases, {arrays} arrays, {len(failed)} failed", flush=True)
    for name in failed:
        print(f"  {name}")
    return status or int(bool(failed))


def _verify(case: Path) -> tuple[list[str], list[str]]:
    """(one line for each array, the names of those that failed)."""
    with waiting(f"verifying {case}"):
        from llava_mini_jax.reproduce.verify import verify

        checks = list(verify(case))
    return [check.line() for check in checks], [c.array for c in checks if not c.passed]
