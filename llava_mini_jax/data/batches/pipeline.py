"""From a data source to batches, through Grain: one global order, a function of seed and step.

    order(seed)[k] --> source[i] --encode--> Example --collate--> Batch(arrays, rejected)
                          |         |                     |
                          '- InputError: an empty row ----'--> who and why stand in `rejected`

In a packed run a row is several samples (sets/packing.py). Process p of n takes every n-th row;
threads read the rows of a batch, a few batches ahead. Batch k depends on the seed and on k alone.
So a resumed run needs no iterator state: it starts at `first_step`; and n processes together see
the same samples in every batch as one does. No other sample takes the place of a broken one: that
would move the order of all that follow.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Example,
    TrainBatch,
    collate,
    learns,
    make_example,
    positions,
)
from llava_mini_jax.data.batches.packed import collate_packed, row_needs
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.data.media.video import preprocess_frames
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.data.sets.order import make_order
from llava_mini_jax.data.sets.packing import PackedOrder
from llava_mini_jax.data.text import conversation, question_ids
from llava_mini_jax.data.text.conversation import TEMPLATES
from llava_mini_jax.errors import InputError


class Source(Protocol):
    """Random access to samples; `id_of` and `dataset_of` name also what cannot be read."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Sample: ...
    def id_of(self, index: Any) -> str | int: ...
    def dataset_of(self, index: Any) -> str: ...


class Encode(Protocol):
    """What makes Examples of samples; `empty` is the row of a sample that cannot be one."""

    def __call__(self, sample: Sample, /) -> Example: ...
    def empty(self) -> Example: ...


class Rejected(NamedTuple):
    """A sample that cannot be learnt from."""

    id: str | int
    dataset: str
    reason: str  # one sentence


class Batch(NamedTuple):
    """This process's rows of a batch; those of rejected samples are empty."""

    arrays: TrainBatch
    rejected: tuple[Rejected, ...]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A sample to an Example, for training."""

    tokenizer: Any
    prompt: PromptConfig
    images: ImageConfig

    def __call__(self, sample: Sample) -> Example:
        return self._with_pixels(sample, *self._pixels(sample))

    def text(self, sample: Sample) -> Example:
        """The example without its pixels: what it takes of a row, and no image is decoded."""
        count = int(self.prompt.blank_image)
        frames = (1,) * count
        if "frames" in sample or "image" in sample:
            frames = (len(sample["frames"]),) if "frames" in sample else (1,)
        return self._with_pixels(sample, np.zeros((0, *self.shape), np.uint8), frames)

    def _with_pixels(self, sample: Sample, pixels: np.ndarray, frames: tuple[int, ...]) -> Example:
        where = f"sample {sample['id']}"
        turns = conversation.from_llava(sample["conversations"], where)
        given = int("frames" in sample or "image" in sample)
        turns = conversation.place_image_mark(turns, given)
        if given and question_ids.reader_of(self.tokenizer) is not None:
            # Each question looks at the image anew.
            turns, given = question_ids.mark_every_question(turns)
            pixels, frames = np.concatenate([pixels] * given), frames * given
        template = TEMPLATES[self.prompt.template]
        # One bos: two are a habit of the release's inference alone (docs/release.md, "Prompts").
        encoded = conversation.encode(
            template, turns, self.tokenizer, double_bos=False, date=self.prompt.date
        )
        conversation.check_images(encoded, given, where)
        conversation.check_supervised(encoded, sample["id"])
        return make_example(encoded, pixels, frames, self.prompt, training=True)

    def _pixels(self, sample: Sample) -> tuple[np.ndarray, tuple[int, ...]]:
        if "frames" in sample:
            frames = preprocess_frames(sample["frames"], self.images, resize="bicubic")
            return frames, (len(frames),)
        if "image" in sample:
            image = sample["image"]
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            return preprocess(load_image(image), self.images)[None], (1,)
        # The release's is zero when normalised; of uint8 images this is the nearest (to 0.01).
        grey = np.rint(255 * np.array(self.images.mean)).astype(np.uint8)
        blank = np.broadcast_to(grey, (int(self.prompt.blank_image), *self.shape))
        return blank, (1,) * len(blank)

    def empty(self) -> Example:
        """One token of text that is neither fused nor learnt: a row without any would attend to
        nothing at all, and have no finite softmax."""
        nothing = np.zeros((0, *self.shape), np.uint8)
        labels = np.full(1, conversation.IGNORE, np.int32)
        return Example(np.zeros(1, np.int32), np.zeros(1, bool), labels, nothing, ())

    @property
    def shape(self) -> tuple[int, ...]:
        """[J, Y, X, C] of one image or frame."""
        return (self.images.parts, self.images.size, self.images.size, 3)


def make_batches(
    source: Source,
    encode: Encode,
    layout: BatchLayout,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    process: int = 0,
    processes: int = 1,
    grouping: str = "none",
    threads: int = 0,
    draw_tokens: Sequence[int] = (),
    packed: PackedOrder | None = None,
) -> Iterator[Batch]:
    """This process's part of every batch from `first_step` on, without end.

    grouping: which samples share a batch (order.py). packed: which share a row; without it each has
    one of its own. threads: that read and encode ahead; 0 is half of the cores. draw_tokens: the
    numbers of vision tokens that each row's is drawn from, all alike likely, but for those with
    which it would not fit.

    Samples are cut after `layout.max_length` positions. One that cannot be read or encoded, has no
    answer, or has its answers cut off leaves an empty row, which adds nothing to the loss, and
    stands in `Batch.rejected`. Other exceptions than InputError end the stream.
    """
    # Takes a second, which those who ask a model need not wait for.
    import grain

    if batch_size % processes:
        raise InputError(f"batch_size {batch_size} is not divided by {processes} processes")
    if threads < 0:
        raise InputError(f"threads is {threads}; it must be 1 or more, or 0 for half of the cores")
    # Half of the cores: the device's own threads need the others where it is the CPU.
    draw = DrawTokens(seed, tuple(draw_tokens), layout) if draw_tokens else None
    threads = threads or max(1, (os.cpu_count() or 1) // 2)
    if packed is None:
        reader = _Reader(source, encode, layout, threads, draw)
        order = make_order(source, grouping, batch_size, seed)
    else:
        reader = _PackedReader(source, encode, layout, threads, packed.images)
        order = grain.MapDataset.source(packed)
    # With its place in the whole run, whatever process reads it and wherever the run goes on.
    order = order.map_with_index(lambda place, index: (place, index))
    # Every n-th: n processes together hold the samples that one would hold alone.
    mine = order[process + first_step * batch_size :: processes]
    return iter(
        # The samples never end; without drop_remainder their number overflows for a share of 1.
        mine.batch(batch_size // processes, drop_remainder=True, batch_fn=reader).to_iter_dataset(
            # Four batches are held. Each has a thread that waits for its rows and collates them.
            grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
        )
    )


class _Row(NamedTuple):
    example: Example
    rejected: Rejected | None


@dataclasses.dataclass(frozen=True)
class DrawTokens:
    """Draws how many vision tokens a row's images have: a function of seed, step and row."""

    seed: int
    counts: tuple[int, ...]
    layout: BatchLayout

    def __call__(self, example: Example, place: int) -> Example:
        """`place` is the row's among all rows of the run: step * batch size + row."""
        if not len(example.pixels):
            return example
        drawn = [dataclasses.replace(example, tokens=count) for count in self.counts]
        fitting = [e for e in drawn if positions(e, 0) <= self.layout.max_length]
        # Of one that never fits, its end is cut off (collate): as little of it as can be.
        fitting = fitting or drawn[:1]
        rng = np.random.default_rng([self.seed, _DRAW, place])
        return fitting[int(rng.integers(len(fitting)))]


_DRAW = 0x746F6B65  # these draws' own stream: orders are drawn from the seed, too


class _Reader:
    """(place, number) of samples to a Batch; its threads serve all batches on their way."""

    _most_images: int | None = None  # of a sample

    def __init__(
        self,
        source: Source,
        encode: Encode,
        layout: BatchLayout,
        threads: int,
        draw: DrawTokens | None = None,
    ):
        self._source, self._encode, self._layout = source, encode, layout
        self._draw = draw
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rows")

    def __call__(self, indices: Sequence[tuple[int, Any]]) -> Batch:
        rows = self._read(indices)
        arrays = collate([row.example for row in rows], self._layout, truncate=True)
        return Batch(arrays, _rejected(rows))

    def _read(self, indices: Sequence[tuple[int, int]]) -> "list[_Row]":
        # A part a thread: a task for every sample costs more than reading a small one.
        size = -(-len(indices) // self._threads)
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        done = self._pool.map(lambda part: [self._row(*each) for each in part], parts)
        return [row for part in done for row in part]

    def _row(self, place: int, index: int) -> _Row:
        layout = self._layout
        try:
            sample = self._source[index]
            example = _cut(self._encode(sample), layout.buckets.lengths[-1])
            if self._draw is not None:
                example = self._draw(example, place)
            if self._most_images is not None and len(example.pixels) > self._most_images:
                raise InputError(
                    f"sample {sample['id']} has {len(example.pixels)} images or frames, and a"
                    f" packed row has room for {self._most_images}; raise packing.images"
                )
            if not layout.videos and any(count > 1 for count in example.frames):
                raise InputError(
                    f"sample {sample['id']} has a video, and the model's compressor is defined on"
                    " images; remove it, or train another method"
                )
            if not learns(example, layout.positions_per_image, layout.max_length):
                raise InputError(
                    f"sample {sample['id']}: none of its first {layout.max_length} positions is "
                    "part of an answer, so there is nothing to learn; raise max_length or remove "
                    "the sample"
                )
        except InputError as error:
            who = self._source.id_of(index), self._source.dataset_of(index)
            return _Row(self._encode.empty(), Rejected(*who, str(error)))
        return _Row(example, None)


_GROWN = "needs more of a row than was counted before the run: its files have changed since"


class _PackedReader(_Reader):
    """(place, numbers of samples) of rows to a Batch. A broken one leaves its row to the others."""

    def __init__(
        self, source: Source, encode: Encode, layout: BatchLayout, threads: int, images: int
    ):
        super().__init__(source, encode, layout, threads)
        self._most_images = images

    def __call__(self, indices: Sequence[tuple[int, Any]]) -> Batch:
        read = self._read([(place, number) for place, row in indices for number in row])
        left, rows, rejected = iter(read), [], []
        for _, row in indices:
            good: list[Example] = []
            for number in row:
                example, why = next(left)
                if why is None and not self._fits(example, good):
                    who = self._source.id_of(number), self._source.dataset_of(number)
                    why = Rejected(*who, f"sample {who[0]} {_GROWN}")
                if why is None:
                    good.append(example)
                else:
                    rejected.append(why)
            rows.append(good or [self._encode.empty()])
        assert self._most_images is not None
        return Batch(collate_packed(rows, self._layout, self._most_images), tuple(rejected))

    def _fits(self, example: Example, before: Sequence[Example]) -> bool:
        """Whether there is room behind those `before`: as was counted, but files may change."""
        if not before:
            return True
        assert self._most_images is not None
        taken, images = zip(
            *(row_needs(each, self._layout) for each in (*before, example)), strict=True
        )
        return sum(taken) <= self._layout.max_length and sum(images) <= self._most_images


def _rejected(rows: Sequence[_Row]) -> tuple[Rejected, ...]:
    return tuple(row.rejected for row in rows if row.rejected is not None)


def _cut(example: Example, length: int) -> Example:
    """Without the text that is beyond every bucket; no position of it would be taken."""
    return dataclasses.replace(
        example,
        ids=example.ids[:length],
        fuse=example.fuse[:length],
        labels=example.labels[:length],
    )
