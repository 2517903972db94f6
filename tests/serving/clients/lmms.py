"""lmms-eval's answers beside this project's own runner's: the same questions, item by item.

write:   evaluation/image/digits.py --> FOLDER/items.jsonl, the data set of lmms_digits/
compare: FOLDER/**/*_samples_*.jsonl, LOCAL/**/answers.jsonl --> a line, and 1 if they differ
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.benchmark import find


def write(folder: Path, items: int) -> None:
    lines = []
    for question in find("digits").questions(folder)[:items]:
        assert isinstance(question.image, bytes)
        picture = base64.b64encode(question.image).decode()
        item = {"key": question.key, "question": question.text, "truth": question.gold}
        lines.append(json.dumps(item | {"picture": picture}) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))


def compare(folder: Path, local: Path, items: int) -> int:
    """0 if every item has the same question and the same answer in both."""
    (samples,) = folder.glob("**/*_samples_*.jsonl")
    (answers,) = local.glob("**/answers.jsonl")
    keys = [item["key"] for item in _lines(folder / "items.jsonl")]  # a doc_id is a line's number
    theirs = {keys[x["doc_id"]]: (x["input"], x["filtered_resps"]) for x in _lines(samples)}
    ours = {x["metadata"]["key"]: (x["prompt"], x["text"]) for x in _lines(answers)}
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    for key in differing:
        print(f"{key}: here {ours.get(key)}, by lmms-eval {theirs.get(key)}")
    same, texts = len(ours | theirs) - len(differing), len({text for _, text in ours.values()})
    print(f"lmms-eval: {same} of {items} answers are eval.py's, {texts} different texts.")
    return 1 if differing or same != items else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    task, place, *rest = sys.argv[1:]
    if task == "write":
        write(Path(place), int(rest[0]))
    else:
        sys.exit(compare(Path(place), Path(rest[0]), int(rest[1])))
