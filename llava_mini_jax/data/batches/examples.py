"""Examples to batches: everything about a batch's shape is decided here, on the host.

    EncodedPrompt (ids, answer spans) + images --make_example--> Example
    Examples --collate--> Inputs (+ labels), padded to declared buckets
             --grow--> padded as far as the other processes' rows of the same batch

Sizes come from `Buckets`, so that a run meets few different shapes and compiles each once.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import struct

from llava_mini_jax.data.batches.questions import of_images
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.data.text.conversation import IGNORE, EncodedPrompt
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.compressors import Choice, Taken
from llava_mini_jax.models.llava_mini import Inputs, LlavaMiniConfig
from llava_mini_jax.models.splice import PADDING, pad_slots, plan_row
from llava_mini_jax.models.texts import Packed
from llava_mini_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation with its images, ready to be put into a batch."""

    ids: np.ndarray  # [T] int32, negative at image marks
    fuse: np.ndarray  # [T] bool, takes part in pre-fusion
    labels: np.ndarray  # [T] int32, IGNORE where nothing is to be learnt
    pixels: np.ndarray  # [I, J, Y, X, C] uint8, images and frames in order; I is 0 for text alone
    frames: tuple[int, ...]  # images of each mark: 1 for an image, F for a video
    tokens: int | None = None  # of each of them; None: as many as the model gives unasked
    questions: tuple[np.ndarray, ...] = ()  # ids of each mark's, where the compressor reads them


@struct.dataclass
class TrainBatch:
    inputs: Inputs
    labels_BS: Leaf  # int32: the token that stands in each slot, IGNORE where it is not supervised
    # int32: of each of the row's images, -1 without any; None where rows do not choose.
    tokens_B: Leaf = None


class Sizes(NamedTuple):
    """What the rows of a batch are padded to."""

    text: int
    fused: int  # text that takes part in pre-fusion
    positions: int  # of the language model
    wide_positions: int  # the same with all patches, for compression inside of it; else 0
    images: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to: text and sequence lengths, and images of a row."""

    lengths: tuple[int, ...]
    images: tuple[int, ...]

    def length(self, needed: int) -> int:
        return _at_least(self.lengths, needed, "positions")

    def image_count(self, needed: int) -> int:
        return _at_least(self.images, needed, "images or frames") if needed else 0


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """(smallest, 2 * smallest, ..., largest); the last one is `largest` itself."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return tuple(sizes)


def fused_places(fuse: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Which text positions take part in pre-fusion [B, size], in order; -1 behind them."""
    places = [np.flatnonzero(row).astype(np.int32) for row in fuse]
    return np.stack([np.pad(p, (0, size - len(p)), constant_values=PADDING) for p in places])


def fused_size(needed: int, text: int) -> int:
    """A quarter of the text, a half or all of it: few sizes, each a program of its own."""
    return next(s for s in (max(1, text // 4), max(1, text // 2), text) if s >= needed)


def _at_least(sizes: tuple[int, ...], needed: int, what: str) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise InputError(f"{needed} {what} are needed, but the largest bucket has {sizes[-1]}")


def make_example(
    prompt: EncodedPrompt,
    pixels: np.ndarray,
    frames: tuple[int, ...],
    cfg: PromptConfig,
    *,
    training: bool,
    tokens: int | None = None,
) -> Example:
    """An Example of an encoded conversation and its images [I, J, Y, X, C].

    Which text takes part in pre-fusion: all of it but image marks and, in training always, answers
    (they do not exist yet when the question is fused). The two switches of `cfg` reproduce the
    release, which fuses earlier answers at inference and never fuses token id 0.
    """
    marks = int((prompt.ids < 0).sum())
    if marks and marks != len(frames):
        raise InputError(
            f"the text has {marks} <image> marks, but {len(frames)} images or videos were given: "
            "put one <image> in the text for each"
        )
    fuse = prompt.ids >= 0
    if training or not cfg.fuse_answers:
        fuse &= ~prompt.answered
    if not cfg.fuse_id_zero:
        fuse &= prompt.ids != 0
    labels = np.where(prompt.supervised, prompt.ids, IGNORE).astype(np.int32)
    ids = prompt.ids.astype(np.int32)
    return Example(ids, fuse, labels, pixels, frames, tokens, prompt.questions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the rows of a batch lie in arrays."""

    tokens_per_image: int
    choice: Choice | None = None  # of the compressor: which tokens a row takes
    patches_per_image: int = 0  # 0, or of compression inside the LLM, which needs slots for all
    videos: bool = True  # whether the compressor is defined on frames
    question: int = 0  # ids of a question that the compressor reads, at most
    buckets: Buckets  # what rows are padded to,
    padding_side: str  # and where: "right" or "left"
    max_length: int  # positions of a row

    @classmethod
    def of(cls, cfg: LlavaMiniConfig, parts: int, **sizes: Any) -> "BatchLayout":
        """That of a model whose images have `parts` parts; `sizes` are the other fields."""
        patches = cfg.patches_per_image(parts) if cfg.inside_layers else 0
        tokens = cfg.tokens_per_image(parts)
        declared = cfg.declared
        return cls(
            tokens_per_image=tokens,
            choice=declared.choice,
            patches_per_image=patches,
            videos=declared.videos,
            question=declared.question,
            **sizes,
        )

    def taken(self, example: Example) -> Taken:
        """Which of each image's tokens stand in a row's sequence."""
        count = tokens_of(example, self.tokens_per_image)
        return Taken(0, count, count) if self.choice is None else self.choice.taken(count)

    @property
    def positions_per_image(self) -> int:
        """Of the language model's first layer."""
        return self.patches_per_image or self.tokens_per_image


def collate(examples: Sequence[Example], layout: BatchLayout, *, truncate: bool) -> TrainBatch:
    """One batch of examples, padded to buckets.

    Sequences beyond `layout.max_length` positions are refused with the arithmetic, or cut there if
    `truncate` (the release cuts silently: docs/release.md, "Splice"). With compression inside the
    language model the long sequence decides: of what is cut there the short one has nothing.
    """
    if not truncate:
        for e in examples:
            check_fits(e, layout.positions_per_image, layout.max_length)
    buckets, tokens, patches = layout.buckets, layout.tokens_per_image, layout.patches_per_image
    text = buckets.length(max(len(e.ids) for e in examples))

    def cut(taken: Sequence[Taken]) -> list[np.ndarray]:
        # Visual tokens are numbered from the bucket's text length, which all rows share.
        pairs = zip(examples, taken, strict=True)
        return [row_slots(e, own, text)[: layout.max_length] for e, own in pairs]

    def padded_slots(rows: Sequence[np.ndarray]) -> np.ndarray:
        return pad_slots(rows, buckets.length(max(map(len, rows))), layout.padding_side)

    rows = cut([layout.taken(e) for e in examples])
    wide_rows = cut([Taken(0, patches, patches)] * len(examples)) if patches else None
    if wide_rows is not None:
        rows = [
            _also_in(wide, row, text, tokens, patches)
            for wide, row in zip(wide_rows, rows, strict=True)
        ]
    slots_BS = padded_slots(rows)
    images = buckets.image_count(max(len(e.pixels) for e in examples))

    def padded(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
        out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    labels_BT = padded([e.labels for e in examples], text)
    is_text_BS = (slots_BS >= 0) & (slots_BS < text)
    labels_BS = np.take_along_axis(labels_BT, np.where(is_text_BS, slots_BS, 0), axis=1)
    asked = [(e.questions, e.frames if len(e.pixels) else ()) for e in examples]
    # Without an image nothing is fused: a long text alone must not make room for itself.
    fuse = [e.fuse & (len(e.pixels) > 0) for e in examples]
    inputs = Inputs(
        ids_BT=padded([e.ids for e in examples], text),
        fuse_BF=fused_places(fuse, fused_size(max(int(row.sum()) for row in fuse), text)),
        pixels_BIJYXC=padded([e.pixels for e in examples], images),
        frames_BI=padded([np.ones(len(e.pixels), bool) for e in examples], images),
        slots_BS=slots_BS,
        wide_slots_BU=None if wide_rows is None else padded_slots(wide_rows),
        question_BIT=of_images(asked, images, layout.question) if layout.question else None,
        padding_side=layout.padding_side,
    )
    labels_BS = np.where(is_text_BS, labels_BS, IGNORE).astype(np.int32)
    return TrainBatch(inputs, labels_BS, tokens_of_rows(examples, layout))


def tokens_of_rows(examples: Sequence[Example], layout: BatchLayout) -> np.ndarray | None:
    """`TrainBatch.tokens_B`."""
    if layout.choice is None:
        return None
    taken = [layout.taken(e).count if len(e.pixels) else -1 for e in examples]
    return np.array(taken, np.int32)


def sizes_of(batch: TrainBatch) -> Sizes:
    inputs = batch.inputs
    wide = 0 if inputs.wide_slots_BU is None else inputs.wide_slots_BU.shape[1]
    text, images = inputs.ids_BT.shape[1], inputs.frames_BI.shape[1]
    fused = (inputs.fuse_BF if inputs.packed is None else inputs.packed.fuse_BIF).shape[-1]
    return Sizes(text, fused, inputs.slots_BS.shape[1], wide, images)


def grow(batch: TrainBatch, sizes: Sizes, padding_side: str) -> TrainBatch:
    """The batch as `collate` would have made it beside rows that need `sizes`, each no smaller."""
    own, inputs = sizes_of(batch), batch.inputs
    if own == sizes:
        return batch
    if inputs.packed is not None:
        return _with_more_fused(batch, inputs.packed, sizes.fused - own.fused)

    def pad(array: np.ndarray, length: int, value: int = 0, side: str = "right") -> np.ndarray:
        missing = length - array.shape[1]
        widths = [(0, 0)] * array.ndim
        widths[1] = (0, missing) if side == "right" else (missing, 0)
        return np.pad(array, widths, constant_values=value)

    def slots(slots: np.ndarray, length: int) -> np.ndarray:
        visual = slots >= own.text  # they are counted from the end of the text
        moved = np.where(visual, slots + (sizes.text - own.text), slots).astype(slots.dtype)
        return pad(moved, length, PADDING, padding_side)

    wide, question = inputs.wide_slots_BU, inputs.question_BIT
    return TrainBatch(
        inputs=Inputs(
            ids_BT=pad(inputs.ids_BT, sizes.text),
            fuse_BF=pad(inputs.fuse_BF, sizes.fused, PADDING),
            pixels_BIJYXC=pad(inputs.pixels_BIJYXC, sizes.images),
            frames_BI=pad(inputs.frames_BI, sizes.images),
            slots_BS=slots(inputs.slots_BS, sizes.positions),
            wide_slots_BU=None if wide is None else slots(wide, sizes.wide_positions),
            question_BIT=None if question is None else pad(question, sizes.images, PADDING),
            padding_side=padding_side,
        ),
        labels_BS=pad(batch.labels_BS, sizes.positions, IGNORE, padding_side),
        tokens_B=batch.tokens_B,
    )


def _with_more_fused(batch: TrainBatch, packed: Packed, more: int) -> TrainBatch:
    """Packed rows differ in how much text their images are fused with, and in nothing else."""
    widths = ((0, 0), (0, 0), (0, more))
    wider = np.pad(np.asarray(packed.fuse_BIF), widths, constant_values=PADDING)
    packed = dataclasses.replace(packed, fuse_BIF=wider)
    inputs = dataclasses.replace(batch.inputs, packed=packed)
    return dataclasses.replace(batch, inputs=inputs)


def row_slots(example: Example, taken: Taken, text: int) -> np.ndarray:
    """Slots of one conversation (models/splice.py) in a batch whose text is `text` ids long."""
    first, count, made = taken
    slots_S = plan_row(example.ids < 0, [frames * count for frames in example.frames], text)
    if count in (0, made):
        return slots_S
    # Of each image `made` tokens stand one behind the other, and the row takes some of them.
    picture_S, token_S = np.divmod(slots_S - text, count)
    chosen_S = text + picture_S * made + first + token_S
    return np.where(slots_S >= text, chosen_S, slots_S).astype(slots_S.dtype)


def tokens_of(example: Example, unasked: int) -> int:
    """Tokens of each of its images; `unasked`: of an example that does not say."""
    return unasked if example.tokens is None else example.tokens


def _also_in(
    wide_U: np.ndarray, slots_S: np.ndarray, text: int, tokens: int, patches: int
) -> np.ndarray:
    """The slots whose text, or the last of whose image's patches, stands in the long sequence."""
    last_patch_S = text + ((slots_S - text) // tokens + 1) * patches - 1
    return slots_S[np.isin(np.where(slots_S < text, slots_S, last_patch_S), wide_U)]


def positions(example: Example, tokens_per_image: int) -> int:
    """How many positions of the language model an example takes; `tokens_per_image` where it does
    not say of how many tokens its images are."""
    marks = int((example.ids < 0).sum())
    # An image without a mark is fused with the text, and takes no position (release).
    tokens = tokens_of(example, tokens_per_image)
    return len(example.ids) - marks + tokens * sum(example.frames[:marks])


def learns(example: Example, tokens_per_image: int, max_length: int) -> bool:
    """Whether anything supervised stands in the first `max_length` positions of an example."""
    count = tokens_of(example, tokens_per_image)
    slots_S = row_slots(example, Taken(0, count, count), len(example.ids))[:max_length]
    text_T = slots_S[slots_S < len(example.ids)]
    return bool((example.labels[text_T] != IGNORE).any())


def check_fits(
    example: Example, tokens_per_image: int, max_length: int, where: str = "the input"
) -> None:
    """Raises InputError, with the arithmetic, for more than `max_length` positions."""
    needed = positions(example, tokens_per_image)
    if needed > max_length:
        words = int((example.ids >= 0).sum())
        raise InputError(
            f"{where} needs {needed} positions ({words} of text, {needed - words} for images), "
            f"but the model has {max_length}: shorten the text or give fewer images or frames"
        )
