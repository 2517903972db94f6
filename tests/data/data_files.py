"""Data sets written for tests: rows in LLaVA's form, files of them, and what opens them."""

import json
from pathlib import Path

import numpy as np

from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig

ANSWER = "the digit is 3"


def turns(question="<image>\nwhich digit is in row 1?", answer=ANSWER):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def rows(count):
    return [{"id": f"s{i}", "conversations": turns("hello", str(i))} for i in range(count)]


def write(path: Path, content) -> str:
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def config_of(*datasets, **changes):
    made = tuple(d if isinstance(d, Dataset) else Dataset(path=str(d)) for d in datasets)
    return SourcesConfig(
        **(dict(datasets=made, video=FrameSampling(fps=1.0, max_frames=4)) | changes)
    )


def ids(*datasets, **changes):
    samples = Samples(config_of(*datasets, **changes))
    return [samples[i]["id"] for i in range(len(samples))]


def page_digits(source: DigitsPages, index: int) -> np.ndarray:
    """The digits that stand on an item's pages: int [pages, rows, columns]."""
    pages = source._plan(index).pages
    return np.array(pages).reshape(-1, source.config.rows, source.config.columns)
