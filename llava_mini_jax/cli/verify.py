"""`llava-mini verify`: recorded outputs of the release against this code, array by array."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import JSON
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import print_json, waiting

if TYPE_CHECKING:
    from llava_mini_jax.reproduce.check import Check

SUMMARY = "compare this code with recorded outputs, array by array"
USAGE = "llava-mini verify CASE [CASE...] [--json]"
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
    parser.add_argument("--json", action="store_true", help=JSON)


def run(args: argparse.Namespace) -> int:
    status, found = 0, []
    for case in args.cases:
        if not args.json:
            print(f"== {case}", flush=True)
        try:
            found.append(_verified(case))
        except InputError as error:
            print(f"llava-mini: {error}", file=sys.stderr)
            status = 2
            continue
        if not args.json:
            print(*_lines(found[-1]), sep="\n", flush=True)
    if args.json:
        print_json([{**each, "arrays": [_described(c) for c in each["arrays"]]} for each in found])
    failed = [f"{each['case']}: {name}" for each in found for name in _failed(each)]
    if not args.json:
        arrays = sum(len(_lines(each)) for each in found)
        unread = len(args.cases) - len(found)
        closing = f"{len(found)} cases, {arrays} arrays, {len(failed)} failed"
        print(closing + (f"; {unread} could not be read" if unread else ""), flush=True)
        print(*(f"  {name}\n" for name in failed), sep="", end="")
    return status or int(bool(failed))


def _verified(case: str) -> dict[str, Any]:
    """The Checks of a case's arrays; or what has failed, a fault of ours."""
    with waiting(f"verifying {case}"):
        from llava_mini_jax.reproduce.verify import verify

        try:
            return {"case": case, "failure": None, "arrays": list(verify(Path(case)))}
        except InputError:
            raise
        except Exception as error:  # the other cases still tell something
            return {"case": case, "failure": f"{type(error).__name__}: {error}", "arrays": []}


def _lines(found: dict[str, Any]) -> list[str]:
    if found["failure"] is not None:
        return [f"FAILED with {found['failure']}"]
    return [check.line() for check in found["arrays"]]


def _failed(found: dict[str, Any]) -> list[str]:
    if found["failure"] is not None:
        return ["the whole case"]
    return [check.array for check in found["arrays"] if not check.passed]


def _described(check: "Check") -> dict[str, Any]:
    return dataclasses.asdict(check) | {"passed": check.passed}
