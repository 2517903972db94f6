"""The pipeline: one global order from the seed, exact starts, and every kind of sample."""

import dataclasses
import itertools
import re
import threading

import jax
import numpy as np
import pytest

from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example
from llava_mini_jax.data.batches.pipeline import Encoder, make_batches
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.compressors import Choice

PROMPT = prompt_config("paper", "brief", 128)
IMAGES = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=32))
TOKENIZER = build_tokenizer()
PAGE = np.full((32, 32, 3), 200, np.uint8)


def batches(source, encode, count, **changes):
    """The first `count` batches of a stream."""
    layout = BatchLayout(
        tokens_per_image=2,
        buckets=Buckets(lengths=(16, 32, 64, 128), images=(1, 2, 4)),
        max_length=changes.pop("max_length", 128),
        padding_side="right",
    )
    options = dict(batch_size=8, seed=3, first_step=0) | changes
    return list(itertools.islice(make_batches(source, encode, layout, **options), count))


def arrays(source, encode, count, **changes):
    """The same of sources without broken samples."""
    found = batches(source, encode, count, **changes)
    assert not any(batch.rejected for batch in found)
    return [batch.arrays for batch in found]


class Listed(list):
    """Samples in memory, each of which can be named."""

    def id_of(self, index):
        return self[index]["id"]

    def dataset_of(self, index):
        return "listed"


class Numbered:
    """A text of one token, which says which sample it is."""

    def __call__(self, number):
        ids = np.array([number], np.int32)
        return Example(ids, np.array([True]), ids, np.zeros((0, 1, 1, 1, 3), np.uint8), ())

    def empty(self):
        raise AssertionError("no number is broken")


numbered = Numbered()


def numbers(stream):
    """[step, row]: the samples of `numbered` batches."""
    return np.array([batch.arrays.inputs.ids_BT[:, 0] for batch in stream])


def test_an_epoch_has_every_sample_once_and_the_next_one_another_order():
    order = numbers(batches(range(40), numbered, 10)).reshape(2, 40)
    assert [sorted(epoch) for epoch in order.tolist()] == [list(range(40))] * 2
    assert order[0].tolist() not in (order[1].tolist(), list(range(40)))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_every_batch(processes):
    whole = numbers(batches(range(40), numbered, 7))
    parts = [
        numbers(batches(range(40), numbered, 7, process=p, processes=processes))
        for p in range(processes)
    ]
    assert parts[0].shape == (7, 8 // processes)
    assert (np.sort(np.concatenate(parts, axis=1)) == np.sort(whole)).all()


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match="batch_size 8 is not divided by 3 processes"):
        batches(range(40), numbered, 1, processes=3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("first_step", [1, 6])  # in the first epoch, and beyond its end
def test_a_stream_that_starts_later_is_the_end_of_the_whole_one(first_step, processes):
    share = dict(process=processes - 1, processes=processes)
    whole = numbers(batches(range(40), numbered, 9, **share))
    later = numbers(batches(range(40), numbered, 9 - first_step, first_step=first_step, **share))
    assert (later == whole[first_step:]).all()


@pytest.mark.parametrize("threads", [3, 8, 20])
def test_threads_change_neither_order_nor_rows(threads):
    one = numbers(batches(range(40), numbered, 7, threads=1))
    assert (numbers(batches(range(40), numbered, 7, threads=threads)) == one).all()


def test_all_threads_read_rows_at_the_same_time():
    together = threading.Barrier(8)

    class Waiting(Numbered):
        def __call__(self, number):
            together.wait(timeout=30)
            return super().__call__(number)

    assert len(batches(range(40), Waiting(), 3, threads=8)) == 3


def test_the_seed_decides_the_order_and_nothing_else_does():
    first, again, other = (numbers(batches(range(40), numbered, 4, seed=s)) for s in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_whole_batches_of_the_digits_world_repeat_bit_for_bit():
    encode = Encoder(TOKENIZER, PROMPT, IMAGES)
    source = DigitsPages(DigitsConfig(page_size=32, turns=2, augment=True), 50)
    whole = batches(source, encode, 4)
    for ours, theirs in zip(batches(source, encode, 2, first_step=2), whole[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (whole[0].arrays.labels_BS != IGNORE).any(axis=1).all()


def sample(kind, text, **media):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "7"}]
    return {"id": kind, "conversations": turns, **media}


MIXED = [
    sample("picture", "<image>\nwhich digit?", image=PAGE),
    sample("video", "<image>\nhow many pages?", frames=np.stack([PAGE] * 3)),
    sample("text", "which is the largest digit?"),
]


def test_pictures_videos_and_text_stand_in_one_batch():
    (batch,) = arrays(MIXED, Encoder(TOKENIZER, PROMPT, IMAGES), 1, batch_size=3)
    inputs = batch.inputs
    assert inputs.pixels_BIJYXC.shape == (3, 4, 1, 32, 32, 3)
    assert inputs.pixels_BIJYXC.dtype == np.uint8
    frames = inputs.frames_BI.sum(axis=1)
    assert sorted(frames.tolist()) == [0, 1, 3]
    T = inputs.ids_BT.shape[1]
    assert ((inputs.slots_BS >= T).sum(axis=1) == 2 * frames).all()
    for row, slots in enumerate(inputs.slots_BS):
        learnt = batch.labels_BS[row] != IGNORE
        assert TOKENIZER.convert_ids_to_tokens(batch.labels_BS[row][learnt]) == ["7", "</s>"]
        assert (slots[learnt] < T).all()
        assert (inputs.ids_BT[row][slots[learnt]] == batch.labels_BS[row][learnt]).all()
        assert not np.isin(inputs.fuse_BF[row], slots[learnt]).any()  # no answer is fused


@pytest.mark.parametrize("blank_image", [False, True])
def test_text_alone_has_no_picture_or_a_blank_one(blank_image):
    prompt = dataclasses.replace(PROMPT, blank_image=blank_image)
    (batch,) = arrays(MIXED[2:], Encoder(TOKENIZER, prompt, IMAGES), 1, batch_size=2)
    inputs = batch.inputs
    assert inputs.pixels_BIJYXC.shape == (2, int(blank_image), 1, 32, 32, 3)
    normalised = (inputs.pixels_BIJYXC / 255 - np.array(IMAGES.mean)) / np.array(IMAGES.std)
    assert (abs(normalised) < 0.01).all() and inputs.frames_BI.all()
    # The blank one is fused with the text, but no token of it stands in the sequence.
    assert (inputs.slots_BS < inputs.ids_BT.shape[1]).all()


@pytest.mark.parametrize("grid", [1, 2])
def test_a_high_resolution_picture_has_its_parts(grid):
    encode = Encoder(TOKENIZER, PROMPT, dataclasses.replace(IMAGES, grid=grid))
    (batch,) = arrays(MIXED, encode, 1, batch_size=3)
    assert batch.inputs.pixels_BIJYXC.shape[2] == (5 if grid == 2 else 1)


LONG = sample("much-too-long", "which digit? " * 10 + "<image>", image=PAGE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sample("no-answer", "hello") | {"conversations": MIXED[2]["conversations"][:1]}, "none"),
        (LONG, "none of its first 32 positions"),
        (sample("no-mark", "which digit?", image=PAGE), "0 times for 1"),
        (sample("no-picture", "<image> which digit?"), "1 times for 0"),
        (sample("empty", "hello") | {"conversations": []}, "list of turns"),
    ],
    ids=lambda value: value["id"] if isinstance(value, dict) else "",
)
def test_a_sample_that_cannot_be_learnt_from_leaves_an_empty_row_and_its_name(wrong, message):
    source = Listed([wrong, *MIXED])
    (batch,) = batches(source, Encoder(TOKENIZER, PROMPT, IMAGES), 1, batch_size=4, max_length=32)
    ((who, dataset, reason),) = batch.rejected
    assert (who, dataset) == (wrong["id"], "listed")
    assert re.search(f"{wrong['id']}.*{message}", reason)
    labels, inputs = batch.arrays.labels_BS, batch.arrays.inputs
    (row,) = np.flatnonzero((labels == IGNORE).all(axis=1))
    assert not inputs.frames_BI[row].any() and (inputs.fuse_BF[row] < 0).all()
    assert (inputs.slots_BS[row] >= 0).sum() == 1


def test_a_batch_of_broken_samples_alone_is_whole():
    source = Listed([LONG | {"id": i} for i in range(2)])
    (batch,) = batches(source, Encoder(TOKENIZER, PROMPT, IMAGES), 1, batch_size=2, max_length=32)
    assert sorted(r.id for r in batch.rejected) == [0, 1]
    assert batch.arrays.inputs.pixels_BIJYXC.shape == (2, 0, 1, 32, 32, 3)
    assert (batch.arrays.labels_BS == IGNORE).all()


def test_faults_of_our_own_end_the_stream():
    class Faulty(Numbered):
        def __call__(self, number):
            raise KeyError(number)

    with pytest.raises(KeyError):
        batches(range(8), Faulty(), 1)


def test_text_beyond_every_bucket_is_cut_as_what_is_beyond_max_length_is():
    text = sample("long-answer", "<image>which digit?", image=PAGE)
    text["conversations"][1]["value"] = "7 " * 300
    encode = Encoder(TOKENIZER, PROMPT, IMAGES)
    (batch,) = arrays(Listed([text]), encode, 1, batch_size=1)
    assert batch.inputs.slots_BS.shape == (1, 128)
    assert (batch.labels_BS[0, -60:] != IGNORE).all()


def test_an_answer_whose_beginning_fits_is_cut_and_learnt():
    encode = Encoder(TOKENIZER, PROMPT, IMAGES)
    (whole,) = arrays([LONG], encode, 1, batch_size=1)
    needed = int((whole.inputs.slots_BS >= 0).sum())
    (cut,) = arrays([LONG], encode, 1, batch_size=1, max_length=needed - 1)
    assert (whole.labels_BS != IGNORE).sum() == 2
    assert (cut.labels_BS != IGNORE).sum() == 1


class Pictured:
    """An image and a text of `length` tokens, the last of which is learnt."""

    def __init__(self, length=4, pictures=1):
        self.length, self.pictures = length, pictures

    def __call__(self, number):
        ids = np.full(self.length + self.pictures, number + 1, np.int32)
        ids[: self.pictures] = -1
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[self.pictures] = 1
        pixels = np.zeros((self.pictures, 1, 2, 2, 3), np.uint8)
        return Example(ids, ids > 0, labels, pixels, (1,) * self.pictures)

    def empty(self):
        raise AssertionError("no number is broken")


DRAWN = (0, 1, 4, 9)


def drawn(count, encode=None, **changes):
    """[step, row]: the vision tokens that rows have drawn, which their slots have."""
    layout = BatchLayout(
        tokens_per_image=1,
        choice=Choice(14, ((0, 0), (1, 0), (4, 1), (9, 5))),
        buckets=Buckets(lengths=(8, 16, 32), images=(1, 2)),
        max_length=changes.pop("max_length", 32),
        padding_side="right",
    )
    encode = encode or Pictured()
    options = dict(batch_size=8, seed=3, first_step=0, draw_tokens=DRAWN) | changes
    found = itertools.islice(make_batches(range(40), encode, layout, **options), count)
    steps = [batch.arrays for batch in found]
    for arrays in steps:
        assert len(arrays.tokens_B) == len(arrays.inputs.slots_BS)
        visual_BS = arrays.inputs.slots_BS >= arrays.inputs.ids_BT.shape[1]
        taken = np.maximum(arrays.tokens_B, 0) * encode.pictures
        assert visual_BS.sum(axis=1).tolist() == taken.tolist()
    return np.array([arrays.tokens_B for arrays in steps])


def test_every_row_draws_its_count_of_vision_tokens():
    whole = drawn(60)
    share = [float((whole == n).mean()) for n in DRAWN]
    assert sum(share) == 1 and all(0.15 < part < 0.35 for part in share)
    assert (whole != whole[:, :1]).any(axis=1).mean() > 0.9  # rows of a batch differ
    assert (drawn(60, seed=4) != whole).any()
    # A sample draws anew in each epoch, of five steps.
    assert (whole[:5] != whole[5:10]).any()
    assert set(drawn(10, draw_tokens=(4,)).ravel()) == {4}
    assert set(drawn(2, draw_tokens=()).ravel()) == {1}  # the model's own


def test_draws_are_a_function_of_seed_step_and_row():
    whole = drawn(6)
    np.testing.assert_array_equal(drawn(2, first_step=4), whole[4:])
    for processes in (2, 4):
        parts = [drawn(6, process=p, processes=processes) for p in range(processes)]
        np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(6, 8), whole)


def test_a_row_draws_among_the_counts_that_fit():
    found = drawn(40, Pictured(length=6, pictures=2), max_length=16)
    assert set(found.ravel()) == {0, 1, 4}
    assert set(drawn(4, Pictured(length=20), max_length=16).ravel()) == {0}


def test_text_alone_draws_nothing():
    assert set(drawn(4, Pictured(pictures=0)).ravel()) == {-1}
