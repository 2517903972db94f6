"""Several conversations in a row, one behind the other: where each of their tokens lies.

    rows of Examples --collate_packed--> TrainBatch whose inputs are `packed` (models/texts.py)

    row   <s> IMAGE a b </s> | <s> c </s> | padding        an image of 2 tokens
    slots  0  S+0 S+1 2 3 4     5  6  7     -1 -1          (models/splice.py)
    segments 0 0 0 0 0 0        1  1  1     -1 -1

Which conversations share a row is data/sets/packing.py's plan. All rows have the longest bucket's
positions, and room for as many images as the plan allows, so that a run compiles few programs.
"""

from collections.abc import Sequence

import numpy as np

from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Example,
    TrainBatch,
    positions,
    power_of_two,
    row_slots,
    tokens_of_rows,
)
from llava_mini_jax.data.batches.questions import of_images
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models.llava_mini import Inputs
from llava_mini_jax.models.splice import PADDING
from llava_mini_jax.models.texts import Packed

_FEWEST_FUSED = 16


def collate_packed(
    rows: Sequence[Sequence[Example]], layout: BatchLayout, images: int
) -> TrainBatch:
    """One batch of rows, each with one conversation or more and at most `images` images.

    A conversation that is longer than a row is alone in one, and cut at its end.
    """
    S = layout.buckets.lengths[-1]
    # Without an image nothing is fused.
    longest = max((int(e.fuse.sum()) for row in rows for e in row if len(e.pixels)), default=0)
    fused = fused_room(longest, S)
    B, pixels = len(rows), rows[0][0].pixels
    inputs = Inputs(
        ids_BT=np.zeros((B, S), np.int32),
        fuse_BF=np.zeros((B, 0), np.int32),
        pixels_BIJYXC=np.zeros((B, images, *pixels.shape[1:]), pixels.dtype),
        frames_BI=np.zeros((B, images), bool),
        slots_BS=np.full((B, S), PADDING, np.int32),
        packed=Packed(
            segments_BS=np.full((B, S), PADDING, np.int32),
            fuse_BIF=np.full((B, images, fused), PADDING, np.int32),
            shares_BI=np.zeros((B, images), np.float32),
        ),
        question_BIT=_questions(rows, images, layout.question),
        padding_side=layout.padding_side,
    )
    labels_BS = np.full((B, S), IGNORE, np.int32)
    for b, row in enumerate(rows):
        _lay(inputs, labels_BS, b, row, layout)
    counted = [max(row, key=lambda e: len(e.pixels)) for row in rows]
    return TrainBatch(inputs, labels_BS, tokens_of_rows(counted, layout))


def fused_room(longest: int, text: int) -> int:
    """Of each image, for text that it is fused with: few sizes, each a program of its own."""
    return min(text, power_of_two(max(longest, _FEWEST_FUSED)))


def _lay(
    inputs: Inputs, labels_BS: np.ndarray, b: int, row: Sequence[Example], layout: BatchLayout
) -> None:
    """Writes a row's conversations into their places."""
    packed, S = inputs.packed, labels_BS.shape[1]
    assert packed is not None
    text = image = place = 0  # what the conversations before have taken
    for number, e in enumerate(row):
        taken = layout.taken(e)
        ids = e.ids[: S - text]
        # Visual tokens are numbered from S, the text's length, as `splice` puts the two.
        slots = row_slots(e, taken, S)[: layout.max_length - place]
        visual = slots >= S
        labels = np.where(visual, IGNORE, e.labels[np.where(visual, 0, slots)])
        labels[:1] = IGNORE  # else the conversation before would predict it
        here = slice(place, place + len(slots))
        inputs.slots_BS[b, here] = slots + np.where(visual, image * taken.made, text)
        labels_BS[b, here] = labels
        packed.segments_BS[b, here] = number
        inputs.ids_BT[b, text : text + len(ids)] = ids
        places, count = text + np.flatnonzero(e.fuse[: len(ids)]), len(e.pixels)
        these = slice(image, image + count)
        inputs.pixels_BIJYXC[b, these] = e.pixels
        inputs.frames_BI[b, these] = True
        packed.fuse_BIF[b, these, : len(places)] = places
        packed.shares_BI[b, these] = 1 / max(count, 1)
        text, image, place = text + len(ids), image + count, place + len(slots)


def row_needs(example: Example, layout: BatchLayout) -> tuple[int, int]:
    """(positions, images) that it takes of a row; marks of images without tokens are ids that
    take no position, and need a place in the row's text."""
    count = layout.taken(example).count
    return max(positions(example, count), len(example.ids)), sum(example.frames)


def conversations_of(batch: TrainBatch) -> int:
    """How many conversations its rows hold; one a row where they are not packed."""
    packed = batch.inputs.packed
    if packed is None:
        return len(batch.labels_BS)
    return int((np.asarray(packed.segments_BS).max(axis=1) + 1).sum())


def _questions(rows: Sequence[Sequence[Example]], images: int, length: int) -> np.ndarray | None:
    """`Inputs.question_BIT`, where a compressor reads questions of `length` ids."""
    if not length:
        return None
    asked = []
    for row in rows:
        shown = [e for e in row if len(e.pixels)]
        questions = [ids for e in shown for ids in e.questions]
        asked.append((questions, [count for e in shown for count in e.frames]))
    return of_images(asked, images, length)
