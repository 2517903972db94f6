"""Batches: buckets, padding at either side, labels around spliced images, what is too long."""

import jax
import numpy as np
import pytest

from llava_mini_jax.config import prompt_config
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Example,
    Sizes,
    check_fits,
    collate,
    grow,
    learns,
    make_example,
    positions,
    powers_of_two,
    sizes_of,
)
from llava_mini_jax.data.text.conversation import IGNORE, EncodedPrompt
from llava_mini_jax.errors import InputError

MARK = -200
BUCKETS = Buckets(lengths=(4, 8, 16), images=(1, 2, 4))


def example(ids, learnt, frames=()):
    """A conversation whose last `learnt` ids are an answer."""
    ids = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[len(ids) - learnt :] = ids[len(ids) - learnt :]
    pixels = np.full((sum(frames), 1, 2, 2, 3), 9, np.uint8)
    return Example(ids, (ids >= 0) & (labels == IGNORE), labels, pixels, frames)


TEXT = example([1, 2, 3], learnt=1)
PICTURE = example([1, MARK, 2, 3, 4], learnt=2, frames=(1,))
VIDEO = example([MARK, 5, 6], learnt=1, frames=(3,))


def batch(examples, side="right", max_length=16, patches_per_image=0, truncate=False, **options):
    layout = BatchLayout(
        tokens_per_image=2,
        patches_per_image=patches_per_image,
        buckets=BUCKETS,
        padding_side=side,
        max_length=max_length,
    )
    return collate(examples, layout, truncate=truncate, **options)


def test_sizes_come_from_the_buckets():
    assert powers_of_two(1, 4) == (1, 2, 4)
    assert powers_of_two(2, 11) == (2, 4, 8, 11)
    assert [BUCKETS.length(n) for n in (1, 4, 5, 16)] == [4, 4, 8, 16]
    assert [BUCKETS.image_count(n) for n in (0, 1, 3)] == [0, 1, 4]
    with pytest.raises(InputError, match="17 positions are needed, but the largest bucket has 16"):
        BUCKETS.length(17)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_stand_where_their_tokens_are_spliced(side):
    answer_alone = example([7, 8], learnt=2)  # its first label must not fill the padding
    ours = batch([TEXT, PICTURE, VIDEO, answer_alone], side)
    T = ours.inputs.ids_BT.shape[1]
    assert T == 8 and ours.labels_BS.shape == ours.inputs.slots_BS.shape == (4, 8)
    rows = [[0, 1, 2], [0, T, T + 1, 2, 3, 4], [*range(T, T + 6), 1, 2], [0, 1]]
    wanted = [[0, 0, 3], [0, 0, 0, 0, 3, 4], [0] * 7 + [6], [7, 8]]
    for slots, labels, row, learnt in zip(
        ours.inputs.slots_BS, ours.labels_BS, rows, wanted, strict=True
    ):
        padding = 8 - len(row)
        before, after = (0, padding) if side == "right" else (padding, 0)
        assert slots.tolist() == [-1] * before + row + [-1] * after
        learnt = [0] * before + learnt + [0] * after
        assert labels.tolist() == [label or IGNORE for label in learnt]


def test_padding_is_no_text_and_no_picture():
    inputs = batch([TEXT, PICTURE, VIDEO]).inputs
    assert inputs.frames_BI.tolist() == [[False] * 4, [True] + [False] * 3, [True] * 3 + [False]]
    assert (inputs.pixels_BIJYXC[inputs.frames_BI] == 9).all()
    assert (inputs.pixels_BIJYXC[~inputs.frames_BI] == 0).all()
    assert (inputs.fuse_BF >= 0).sum(axis=1).tolist() == [0, 2, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_parts_of_a_batch_grow_to_what_they_are_in_the_whole(side):
    rows = [TEXT, PICTURE, VIDEO]
    whole = batch(rows, side, patches_per_image=3)
    parts = [batch([row], side, patches_per_image=3) for row in rows]
    sizes = Sizes(*np.max([sizes_of(part) for part in parts], axis=0).tolist())
    assert sizes == sizes_of(whole) and len({sizes_of(part) for part in parts}) == 3
    grown = [grow(part, sizes, side) for part in parts]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *grown)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_what_is_too_long_is_refused_with_the_arithmetic_or_cut():
    assert positions(VIDEO, 2) == 8
    check_fits(VIDEO, 2, 8)
    with pytest.raises(
        InputError, match=r"row 3 needs 8 positions \(2 of text, 6 for images\), but .* has 7"
    ):
        check_fits(VIDEO, 2, 7, "row 3")
    with pytest.raises(InputError, match="needs 8 positions"):
        batch([TEXT, VIDEO], max_length=7)
    cut = batch([TEXT, VIDEO], max_length=7, truncate=True)
    assert (cut.inputs.slots_BS[1] >= 0).sum() == 7
    assert (cut.labels_BS[1] == IGNORE).all() and (cut.labels_BS[0] != IGNORE).any()


def test_whether_anything_is_learnt_depends_on_what_fits():
    assert [learns(PICTURE, 2, length) for length in (4, 5, 6)] == [False, True, True]
    assert learns(VIDEO, 2, 8) and not learns(VIDEO, 2, 7)
    assert not learns(example([1, 2], learnt=0), 2, 8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_with_compression_inside_the_long_sequence_decides_what_is_cut(side):
    """Of PICTURE's ten positions with six patches eight fit, and of what is cut none is learnt."""
    rows = [PICTURE, TEXT, example([1, 2, 3, MARK, 4, 5], learnt=1, frames=(1,))]
    whole, cut = (
        batch(rows, side, max_length=length, truncate=True, patches_per_image=6)
        for length in (16, 8)
    )
    T = cut.inputs.ids_BT.shape[1]
    slots, long = ([[s for s in row if s >= 0] for row in array.tolist()] for array in (
        cut.inputs.slots_BS, cut.inputs.wide_slots_BU
    ))  # fmt: skip
    assert long[0] == [0, *range(T, T + 6), 2] and slots[0] == [0, T, T + 1, 2]
    assert slots[1] == long[1] == [0, 1, 2]
    # Five of the six patches of an image are not the whole of what is compressed.
    assert long[2] == [0, 1, 2, *range(T, T + 5)] and slots[2] == [0, 1, 2]
    assert (whole.labels_BS != IGNORE).sum(axis=1).tolist() == [2, 1, 1]
    assert (cut.labels_BS != IGNORE).sum(axis=1).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="needs 10 positions"):
        batch(rows, side, max_length=9, patches_per_image=6)


def encoded(ids, answered, open_end=False):
    answered = np.array(answered, bool)
    return EncodedPrompt(np.array(ids, np.int32), answered & (not open_end), answered)


@pytest.mark.parametrize(
    ("dialect", "training", "fused"),
    [
        ("paper", True, [1, 0, 1, 0, 1, 0]),  # neither marks nor answers
        ("paper", False, [1, 0, 1, 0, 1, 0]),
        ("release", True, [1, 0, 1, 0, 0, 0]),  # nor id zero
        ("release", False, [1, 0, 1, 1, 0, 1]),  # earlier answers are fused
    ],
)
def test_what_takes_part_in_prefusion(dialect, training, fused):
    prompt = encoded([1, MARK, 2, 3, 0, 4], [0, 0, 0, 1, 0, 1], open_end=not training)
    config = prompt_config(dialect, "brief", 64)
    pixels = np.zeros((1, 1, 2, 2, 3), np.uint8)
    made = make_example(prompt, pixels, (1,), config, training=training)
    assert made.fuse.tolist() == [bool(f) for f in fused]
    learnt = [IGNORE, IGNORE, IGNORE, 3, IGNORE, 4] if training else [IGNORE] * 6
    assert made.labels.tolist() == learnt


def test_marks_and_pictures_must_agree():
    config = prompt_config("paper", "brief", 64)
    pixels = np.zeros((2, 1, 2, 2, 3), np.uint8)
    with pytest.raises(InputError, match="1 <image> marks, but 2 images or videos"):
        make_example(encoded([MARK, 1], [0, 1]), pixels, (1, 1), config, training=True)
