"""Splicing: any batch of texts and images gives the sequences that a naive splice gives."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Example,
    TrainBatch,
    collate,
    powers_of_two,
)
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.splice import pad_slots, plan_row, splice
from tests.tiny import MARK

BUCKETS = Buckets(lengths=powers_of_two(4, 64), images=(1, 2, 4, 8, 16))


def make(ids: list[int], frames: list[int], supervised: list[bool]) -> Example:
    ids_T = np.array(ids, np.int32)
    labels = np.where(np.array(supervised) & (ids_T >= 0), ids_T, IGNORE).astype(np.int32)
    # One pixel an image, which says which image of the row it is.
    pixels = np.arange(sum(frames), dtype=np.uint8).reshape(-1, 1, 1, 1, 1).repeat(3, axis=4)
    return Example(ids_T, ids_T > 0, labels, pixels, tuple(frames))


@st.composite
def examples(draw) -> Example:
    marked = draw(st.lists(st.booleans(), min_size=1, max_size=9).filter(lambda m: sum(m) <= 3))
    ids = [MARK if mark else draw(st.integers(0, 50)) for mark in marked]
    # A row without a mark may still bring an image, with which its text is fused (release).
    pictures = sum(marked) or draw(st.integers(0, 1))
    frames = draw(st.lists(st.integers(1, 3), min_size=pictures, max_size=pictures))
    supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return make(ids, frames, supervised)


def naive(example: Example, tokens: int) -> list[tuple]:
    """What stands where: ("text", position) or ("visual", number of the row's visual token)."""
    sequence, used, frames = [], 0, iter(example.frames)
    for position, token in enumerate(example.ids):
        if token < 0:
            count = next(frames) * tokens
            sequence += [("visual", used + i) for i in range(count)]
            used += count
        else:
            sequence.append(("text", position))
    return sequence


def collated(
    rows: list[Example], tokens: int, side: str, truncate: bool = False, **changes
) -> TrainBatch:
    sizes = dict(buckets=BUCKETS, padding_side=side, max_length=64) | changes
    return collate(rows, BatchLayout(tokens_per_image=tokens, **sizes), truncate=truncate)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(examples(), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["right", "left"]),
)
def test_a_batch_is_the_naive_splice_of_its_rows(rows, tokens, side) -> None:
    batch = collated(rows, tokens, side)
    inputs, text = batch.inputs, batch.inputs.ids_BT.shape[1]
    length = inputs.slots_BS.shape[1]
    assert text in BUCKETS.lengths and length in BUCKETS.lengths
    assert inputs.pixels_BIJYXC.shape[1] in (0, *BUCKETS.images)
    for b, example in enumerate(rows):
        expected = naive(example, tokens)
        slots = inputs.slots_BS[b]
        real = slots[len(slots) - len(expected) :] if side == "left" else slots[: len(expected)]
        assert (np.delete(slots, np.flatnonzero(slots >= 0)) == -1).all()
        assert (slots >= 0).sum() == len(expected)
        found = [("text", s) if s < text else ("visual", s - text) for s in real.tolist()]
        assert found == expected
        size, images = len(example.ids), len(example.pixels)
        assert inputs.ids_BT[b, :size].tolist() == example.ids.tolist()
        fused = np.flatnonzero(example.fuse).tolist() if images else []
        padding = [-1] * (inputs.fuse_BF.shape[1] - len(fused))
        assert inputs.fuse_BF[b].tolist() == fused + padding
        np.testing.assert_array_equal(inputs.pixels_BIJYXC[b, :images], example.pixels)
        assert inputs.frames_BI[b].sum() == images and inputs.frames_BI[b, :images].all()
        labels = batch.labels_BS[b]
        expected_labels = [
            example.labels[at] if kind == "text" else IGNORE for kind, at in expected
        ]
        assert labels[slots >= 0].tolist() == expected_labels
        assert (labels[slots < 0] == IGNORE).all()


@settings(max_examples=50, deadline=None)
@given(examples(), st.integers(1, 4), st.integers(1, 12))
def test_truncation_keeps_the_start(example, tokens, limit) -> None:
    expected = naive(example, tokens)
    batch = collated([example], tokens, "right", max_length=limit, truncate=True)
    assert (batch.inputs.slots_BS >= 0).sum() == min(limit, len(expected))
    whole = collated([example], tokens, "right").inputs.slots_BS[0]
    kept = batch.inputs.slots_BS[0][: min(limit, len(expected))]
    np.testing.assert_array_equal(kept, whole[: len(kept)])
    if len(expected) > limit:
        with pytest.raises(InputError, match=f"needs {len(expected)} positions.*has {limit}"):
            collated([example], tokens, "right", max_length=limit)


def test_the_device_gathers_what_the_host_planned() -> None:
    rng = np.random.default_rng(0)
    text, visual = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 4, 3))
    slots = pad_slots([plan_row([0, 1, 0, 0, 0], [2], 5), plan_row([1, 1], [1, 3], 5)], 7, "left")
    found = jax.jit(splice)(text.astype(np.float32), visual.astype(np.float32), slots)
    expected = np.zeros((2, 7, 3))
    expected[0, 1:] = [text[0, 0], *visual[0, :2], *text[0, 2:]]
    expected[1, 3:] = visual[1]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_docstring_example() -> None:
    row = plan_row([False, False, True, False, False], [2], 5)
    assert pad_slots([row], 7).tolist() == [[0, 1, 5, 6, 3, 4, -1]]
    assert pad_slots([row], 7, "left").tolist() == [[-1, 0, 1, 5, 6, 3, 4]]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="more image marks than the 1 visual inputs"):
        plan_row([True, True], [1], 4)
    with pytest.raises(ValueError, match="row 1 has 3 positions, more than 2"):
        pad_slots([np.arange(2), np.arange(3)], 2)
    with pytest.raises(InputError, match=r"65 positions are needed.*largest bucket has 64"):
        BUCKETS.length(65)
    with pytest.raises(InputError, match="17 images or frames are needed"):
        BUCKETS.image_count(17)
    assert BUCKETS.image_count(0) == 0 and BUCKETS.length(5) == 8
    assert powers_of_two(3, 20) == (3, 6, 12, 20)
