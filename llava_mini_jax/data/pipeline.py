"""From a data source to batches, through Grain: one global order, a function of seed and step.

    source[i] --shuffle(seed), repeat--> samples --encode--> Examples --collate--> TrainBatch
                                                                                       |
                        process p of n takes every n-th sample; threads read ahead ----'

Batch k depends on the seed and on k alone. So a resumed run needs no iterator state: it starts at
`first_step`; and n processes together see the same samples in every batch as one does.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from llava_mini_jax.config import PromptConfig
from llava_mini_jax.data import conversation
from llava_mini_jax.data.conversation import TEMPLATES
from llava_mini_jax.data.examples import (
    Buckets,
    Example,
    TrainBatch,
    collate,
    learns,
    make_example,
)
from llava_mini_jax.data.images import ImageConfig, load_image, preprocess
from llava_mini_jax.data.video import preprocess_frames
from llava_mini_jax.errors import InputError


class Source(Protocol):
    """Random access to samples in LLaVA's form: {"id", "image" or "frames", "conversations"}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A sample to an Example, for training."""

    tokenizer: Any
    prompt: PromptConfig
    images: ImageConfig

    def __call__(self, sample: dict[str, Any]) -> Example:
        where = f"sample {sample['id']}"
        turns = conversation.from_llava(sample["conversations"], where)
        pixels, frames = self._pixels(sample)
        given = int("frames" in sample or "image" in sample)
        turns = conversation.place_image_mark(turns, given)
        template = TEMPLATES[self.prompt.template]
        encoded = conversation.encode(template, turns, self.tokenizer, double_bos=False)
        conversation.check_images(encoded, given, where)
        conversation.check_supervised(encoded, sample["id"])
        return make_example(encoded, pixels, frames, self.prompt, training=True)

    def _pixels(self, sample: dict[str, Any]) -> tuple[np.ndarray, tuple[int, ...]]:
        if "frames" in sample:
            frames = preprocess_frames(sample["frames"], self.images, resize="bicubic")
            return frames, (len(frames),)
        if "image" in sample:
            image = sample["image"]
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            return preprocess(load_image(image), self.images)[None], (1,)
        blank = np.full((int(self.prompt.blank_image), *self.shape), 127, np.uint8)
        return blank, (1,) * len(blank)

    @property
    def shape(self) -> tuple[int, ...]:
        """[J, Y, X, C] of one image or frame."""
        return (self.images.parts, self.images.size, self.images.size, 3)


def make_batches(
    source: Source,
    encode: Callable[[dict[str, Any]], Example],
    *,
    batch_size: int,
    tokens_per_image: int,
    patches_per_image: int = 0,
    buckets: Buckets,
    max_length: int,
    padding_side: str,
    seed: int,
    first_step: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[TrainBatch]:
    """This process's part of every batch from `first_step` on, without end.

    Samples are cut after `max_length` positions; one whose answers are all cut off is an
    InputError, as is one that has none.
    """
    import grain

    if batch_size % processes:
        raise InputError(f"batch_size {batch_size} is not divided by {processes} processes")

    def learnable(sample: dict[str, Any]) -> Example:
        example = encode(sample)
        if not learns(example, tokens_per_image, max_length):
            raise InputError(
                f"sample id {sample['id']}: none of its first {max_length} positions is part of an "
                "answer, so there is nothing to learn; raise max_length or remove the sample"
            )
        return example

    def batch(examples: Sequence[Example]) -> TrainBatch:
        return collate(
            examples,
            tokens_per_image=tokens_per_image,
            patches_per_image=patches_per_image,
            buckets=buckets,
            padding_side=padding_side,
            max_length=max_length,
            truncate=True,
        )

    share = batch_size // processes
    samples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()  # pyright: ignore
    mine = samples[process + first_step * batch_size :: processes].map(learnable)
    return iter(
        # The samples never end; without drop_remainder their number overflows for a share of 1.
        mine.batch(share, drop_remainder=True, batch_fn=batch).to_iter_dataset(
            # Half of the cores: the device's own threads need the others where it is the CPU.
            grain.ReadOptions(
                num_threads=max(1, (os.cpu_count() or 1) // 2), prefetch_buffer_size=4
            )
        )
    )
