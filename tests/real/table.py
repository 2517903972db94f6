"""The rows of tests/real/back.py for several versions of transformers as one Markdown table.

python tests/real/table.py OUT VERSION ...
"""

import json
import sys
from pathlib import Path


def main(out: Path, versions: list[str]) -> None:
    rows = {v: json.loads((out / v / "rows.json").read_text()) for v in versions}
    newest = rows[versions[-1]]
    print(
        "Made by `make real-check`:",
        "; ".join((out / v / "versions").read_text() for v in versions),
    )
    print()
    print("| folder | here | exported, read by transformers |", " | ".join(versions), "|")
    print("|---|---|---|" + "---|" * len(versions))
    for name, row in newest.items():
        marks = [rows[v].get(name, {}).get("right") for v in versions]
        words = ["not made" if m is None else "right" if m else "**WRONG**" for m in marks]
        print(f"| {name} | {row['here']} | {row['back']} |", " | ".join(words), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
