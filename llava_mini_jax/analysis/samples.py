"""Conversations with images and answers for analyses, read one at a time.

"digits" | LLaVA JSON, JSON Lines, Parquet, a built folder --> samples --Encoder--> Examples
                                                                   '--> why one was left out
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Example,
    TrainBatch,
    check_fits,
    collate,
)
from llava_mini_jax.data.batches.pipeline import Encoder, Source
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds

DIGITS = "digits"
FPS, MAX_FRAMES = 1.0, 64


def open_source(name: str, images: str, limit: int) -> Source:
    """At most `limit` held-out pages of the digits world, or the samples of a data file."""
    if limit < 1:
        raise InputError(f"--limit is {limit}; give 1 or more")
    if name == DIGITS:
        from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages

        return DigitsPages(DigitsConfig(split="heldout"), limit)
    from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig

    dataset = Dataset(path=name, images=images)
    return Samples(
        SourcesConfig(datasets=(dataset,), video=FrameSampling(fps=FPS, max_frames=MAX_FRAMES))
    )


class Examples:
    """Iterates over the first `limit` samples; `left_out` fills with why some are not there."""

    def __init__(self, source: Source, bundle: Bundle, tokenizer: Any, limit: int):
        self.left_out: list[str] = []
        self._source, self._bundle = source, bundle
        self._count = min(limit, len(source))
        self._encode = Encoder(tokenizer, bundle.prompt, bundle.images)

    def __iter__(self) -> Iterator[Example]:
        longest = bounds.longest_prompt(self._bundle)
        for number in range(self._count):
            where = f"sample {self._source.id_of(number)}"
            try:
                example = self._encode(self._source[number])
                check_fits(example, bounds.tokens_per_image(self._bundle), longest, where)
            except InputError as error:
                self.left_out.append(str(error))
                continue
            if example.frames:
                yield example
            else:
                self.left_out.append(f"{where} has no image")


def padded_batch(
    examples: Sequence[Example], bundle: Bundle, buckets: Buckets, batch_size: int
) -> TrainBatch:
    """A batch of always `batch_size` rows; those beyond the examples are all padding."""
    none = np.zeros(0, np.int32)
    empty = Example(none, none.astype(bool), none, examples[0].pixels[:0], ())
    layout = BatchLayout.of(
        bundle.model,
        bundle.images.parts,
        buckets=buckets,
        padding_side=bundle.prompt.padding_side,
        max_length=bounds.longest_prompt(bundle),
    )
    return collate([*examples, *[empty] * (batch_size - len(examples))], layout, truncate=False)
