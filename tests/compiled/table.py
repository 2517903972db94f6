"""The tables of docs/results/compiled.md from files of `llava-mini profile compile --report FILE`.

python tests/compiled/table.py FILE.json ...      one row a program, in their order
"""

import json
import sys
from pathlib import Path
from typing import Any

TRAINING = (
    "step | chip, mesh | compile s | GiB: arguments + temporaries | `--dry-run` | products TFLOP"
    " | traffic GB, of it XLA's attention | time, s | MFU at most | kernel by kernel | links GB"
    " | attention"
)
ANSWERS = (
    "program | chip, mesh | compile s | GiB: arguments + temporaries | products TFLOP | traffic GB"
    " | time, ms | links GB | attention | copies of the cache a call"
)


def training(found: dict[str, Any]) -> str:
    first, *others = found["floors"].values()
    attention = f" of it {found['attention_gb']:,.0f}" if found["attention_gb"] >= 0.5 else ""
    second = f"{others[0]['ms'] / 1e3:.2f} s, {others[0]['mfu']:.2f}" if others else ""
    cells = [
        f"{_name(found)}: {found['sizes']}",
        _place(found),
        f"{found['compile_seconds']:.0f}",
        _memory(found),
        f"{found['estimate_gib']:.1f}",
        f"{found['tflop']:,.0f}",
        f"{found['traffic_gb']:,.0f}{attention}",
        f"{first['ms'] / 1e3:.2f}",
        f"**{first['mfu']:.2f}**",
        second,
        f"{found['wire_gb']:,.0f}",
        _attention(found),
    ]
    return " | ".join(cells)


def answer(found: dict[str, Any]) -> str:
    *_, last = found["floors"].values()
    copies = found["cache_copies"]
    cells = [
        f"{found['program']}: {found['sizes']}",
        _place(found),
        f"{found['compile_seconds']:.0f}",
        _memory(found),
        f"{found['tflop']:,.3g}",
        f"{found['traffic_gb']:,.1f}",
        f"{last['ms']:,.1f}",
        f"{found['wire_gb']:,.2f}",
        _attention(found),
        str(len(copies)),
    ]
    return " | ".join(cells)


def _name(found: dict[str, Any]) -> str:
    return found["program"].removesuffix(", a training step")


def _place(found: dict[str, Any]) -> str:
    mesh = "" if found["mesh"] == "none" else f", {found['mesh']}"
    return f"{found['chip']} {found['slice']}{mesh}"


def _memory(found: dict[str, Any]) -> str:
    memory = found["memory_gib"]
    total = f"{memory['total']:.1f} of {found['capacity_gib']:g}"
    return f"{total}: {memory['arguments']:.2f} + {memory['temporaries']:.2f}"


def _attention(found: dict[str, Any]) -> str:
    names = (f"XLA {what}" if name == "xla" else name for name, what in found["attention"].items())
    return "; ".join(names) or "-"


def main(files: list[str]) -> None:
    found = [each for file in files for each in json.loads(Path(file).read_text())]
    steps = [each for each in found if each["model_tflop"]]
    others = [each for each in found if not each["model_tflop"]]
    for header, rows in ((TRAINING, map(training, steps)), (ANSWERS, map(answer, others))):
        lines = [header, " | ".join("---" for _ in header.split(" | ")), *rows]
        if len(lines) > 2:
            print(*(f"| {line} |" for line in lines), "", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
