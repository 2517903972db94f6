"""Grouped orders: whole permutations, batches of one kind, aligned with the batches of the run."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example
from llava_mini_jax.data.batches.pipeline import Encoder, make_batches
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.order import MODALITIES, GroupedOrder, Groups, make_order
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
from llava_mini_jax.errors import InputError


def groups_of(counts, seed=0):
    """Some samples of each modality in random order, with random lengths."""
    rng = np.random.default_rng(seed)
    modality = rng.permutation(np.repeat(np.arange(3), counts)).astype(np.int8)
    return Groups(modality, rng.integers(0, 1000, len(modality)).astype(np.int32))


@settings(deadline=None, max_examples=200)
@given(
    counts=st.tuples(*[st.integers(0, 40)] * 3).filter(any),
    size=st.integers(1, 12),
    epoch=st.integers(0, 10),
    by_length=st.booleans(),
)
def test_an_epoch_is_a_permutation_in_batches_of_one_modality(counts, size, epoch, by_length):
    groups, total = groups_of(counts), sum(counts)
    order = GroupedOrder(groups, size, 7, by_length=by_length).epoch(epoch)
    assert sorted(order.tolist()) == list(range(total))
    begin = min(-epoch * total % size, total)  # where the first batch of the run begins in it
    count = (total - begin) // size
    batches = groups.modality[order[begin : begin + count * size]].reshape(count, size)
    mixed = int((batches != batches[:, :1]).any(axis=1).sum())
    assert mixed <= max(0, np.count_nonzero(counts) - 1)


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    groups = groups_of((50, 20, 30))

    def first(seed, epochs):
        order = GroupedOrder(groups, 8, seed, by_length=True)
        return [order[i] for i in range(epochs * 100)]

    again = GroupedOrder(groups, 8, 1, by_length=True)
    backwards = [again[i] for i in reversed(range(200))][::-1]
    assert first(1, 2) == backwards
    assert first(1, 2)[:100] != first(1, 2)[100:] and first(1, 1) != first(2, 1)


def test_samples_of_a_batch_are_of_similar_length_but_not_always_the_same_ones():
    groups = groups_of((4000, 0, 4000))
    spread = {}
    for by_length in (False, True):
        order = GroupedOrder(groups, 8, 0, by_length=by_length)
        words = groups.words[order.epoch(0)].reshape(-1, 8)
        spread[by_length] = np.ptp(words, axis=1).mean()
        # Batches are shuffled: neither modality nor length goes from one end to the other.
        kinds = groups.modality[order.epoch(0)].reshape(-1, 8)[:, 0]
        longest = words.max(axis=1)
        assert 400 < np.count_nonzero(np.diff(kinds)) < 600
        assert 400 < np.count_nonzero(np.diff(longest) > 0) < 600
    assert spread[True] < spread[False] / 10
    one, other = ({frozenset(b) for b in order.epoch(e).reshape(-1, 8).tolist()} for e in (0, 1))
    assert not one & other


def test_a_million_samples():
    import time

    groups = groups_of((600_000, 100_000, 300_001))
    order = GroupedOrder(groups, 256, 0, by_length=True)
    began = time.monotonic()
    assert len(np.unique(order.epoch(3))) == 1_000_001
    assert time.monotonic() - began < 20  # a second or less on an idle core


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(InputError, match='grouping is "lenght"; use one of none, modality'):
        make_order(range(3), "lenght", 2, 0)
    with pytest.raises(InputError, match=r'DigitsPages.* is all of one kind; use "none"'):
        make_order(DigitsPages(DigitsConfig(), 3), "modality", 2, 0)
    with pytest.raises(InputError, match='grouping of a SourcesConfig is "x"'):
        SourcesConfig(
            datasets=(Dataset(path="a.json"),),
            video=FrameSampling(fps=1.0, max_frames=1),
            grouping="x",
        )


# --- On files -------------------------------------------------------------------------------------

WORDS = 80


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Samples:
    """90 images and 70 texts of 1 to 80 words."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (8, 8)).save(folder / "page.png")
    rows = []
    for number in range(160):
        picture = {"image": "page.png"} if number % 16 < 9 else {}
        text = "<image>\n" * bool(picture) + "which " * (number * 37 % WORDS + 1)
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "7"}]
        rows.append({"id": number, **picture, "conversations": turns})
    (folder / "mixed.json").write_text(json.dumps(rows))
    datasets = (Dataset(path=str(folder / "mixed.json")),)
    return Samples(SourcesConfig(datasets=datasets, video=FrameSampling(fps=1.0, max_frames=2)))


def batches(source, encode, count, **changes):
    layout = BatchLayout(
        tokens_per_image=1,
        buckets=Buckets(lengths=(32, 64, 128), images=(1, 2)),
        max_length=128,
        padding_side="right",
    )
    options = dict(batch_size=8, seed=3, first_step=0) | changes
    stream = make_batches(source, encode, layout, **options)
    return [batch.arrays for batch in itertools.islice(stream, count)]


class Numbered:
    """A text of one token, which says which sample it is."""

    def __call__(self, sample):
        ids = np.array([sample["id"]], np.int32)
        return Example(ids, np.array([True]), ids, np.zeros((0, 1, 1, 1, 3), np.uint8), ())

    def empty(self):
        raise AssertionError("no number is broken")


def numbers(source, count, **changes):
    return np.array([b.inputs.ids_BT[:, 0] for b in batches(source, Numbered(), count, **changes)])


@pytest.mark.parametrize("grouping", ["modality", "modality_length"])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_every_batch_of_a_grouped_order(mixed, grouping, processes):
    whole = numbers(mixed, 25, grouping=grouping)
    parts = [
        numbers(mixed, 25, grouping=grouping, process=p, processes=processes)
        for p in range(processes)
    ]
    assert (np.sort(np.concatenate(parts, axis=1)) == np.sort(whole)).all()


@pytest.mark.parametrize("grouping", ["none", "modality_length"])
def test_the_order_depends_on_neither_threads_nor_the_first_step(mixed, grouping):
    whole = numbers(mixed, 30, grouping=grouping, threads=1)
    assert sorted(whole[:20].ravel().tolist()) == list(range(160))
    for threads in (2, 7):
        assert (numbers(mixed, 30, grouping=grouping, threads=threads) == whole).all()
    later = numbers(mixed, 7, grouping=grouping, first_step=23)  # in the second epoch
    assert (later == whole[23:]).all()


def test_negative_threads_are_refused(mixed):
    with pytest.raises(InputError, match="threads is -1"):
        numbers(mixed, 1, threads=-1)


def test_grouping_saves_padding(mixed):
    images = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=16))
    encode = Encoder(build_tokenizer(), prompt_config("paper", "brief", 128), images)
    positions, pictures = {}, {}
    for grouping in ("none", "modality", "modality_length"):
        epoch = batches(mixed, encode, 20, grouping=grouping)
        positions[grouping] = sum(batch.labels_BS.size for batch in epoch)
        pictures[grouping] = sum(batch.inputs.pixels_BIJYXC.shape[1] for batch in epoch)
    # The fewest batches that 90 images fit in; text alone does not run the tower.
    assert pictures == {"none": 20, "modality": 12, "modality_length": 12}
    assert positions["modality_length"] < 0.85 * positions["none"]


def test_groups_are_told_from_the_rows_alone(tmp_path):
    said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a bus"}]
    rows = [
        {"image": "nowhere.jpg", "conversations": said},
        {"images": ["nowhere.jpg"], "conversations": said},
        {"video": "nowhere.mp4", "conversations": said},
        {"q": "who?", "a": "nobody", "video_id": "v"},
        {"image": "", "conversations": said[1:]},
        {"image": {"bytes": None, "path": None}, "conversations": said[1:]},
        {"image": ["a.jpg", "b.jpg"], "conversations": said},
        {"conversations": "broken"},
        3,
    ]
    lines = [*map(json.dumps, rows), "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dataset = Dataset(path=str(tmp_path / "rows.jsonl"), weight=2.0)
    samples = Samples(
        SourcesConfig(datasets=(dataset,), video=FrameSampling(fps=1.0, max_frames=2))
    )
    groups = samples.groups()
    kinds = ["image", "image", "video", "video", *["text"] * 6]
    assert [MODALITIES[m] for m in groups.modality] == kinds * 2
    assert groups.words.tolist() == [6, 6, 6, 2, 2, 2, 0, 0, 0, 0] * 2
    assert (groups.modality.dtype, groups.words.dtype) == (np.int8, np.int32)
