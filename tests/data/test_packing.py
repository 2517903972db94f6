"""Which conversations share a row, and the batches that come of it."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_mini_jax import cli
from llava_mini_jax.config import image_config, prompt_config
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, positions
from llava_mini_jax.data.batches.needs import as_needs, needs_of
from llava_mini_jax.data.batches.packed import conversations_of
from llava_mini_jax.data.batches.pipeline import Encoder, make_batches
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.data.sets.packing import Needs, PackedOrder, PackingConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import packing_plan
from llava_mini_jax.training.stages import load_config, stages_of
from tests import tiny
from tests.conftest import ROOT


def mix(count: int) -> Needs:
    """Lengths like those of LLaVA's mix of 665k: mostly an image and some hundred positions, and
    some long conversations without one."""
    rng = np.random.default_rng(0)
    kind = rng.random(count)
    short, middle, long = (
        40 + rng.lognormal(mean, sigma, count)
        for mean, sigma in ((4.9, 0.6), (5.3, 0.35), (6.6, 0.8))
    )
    lengths = np.where(kind < 0.06, long, np.where(kind < 0.4, middle, short))
    images = (kind >= 0.06).astype(np.int32)
    return Needs(lengths.astype(np.int32), images, 30 * images)


def test_rows_of_a_mix_are_full() -> None:
    needs = mix(20_000)
    order = PackedOrder(needs, 2048, 12, 4096, seed=3)
    filling = order.filling()
    assert filling.positions >= 0.97 and filling.most_images <= 12
    # A row for each, in batches of like length, is padded to powers of two at the best.
    alone = np.minimum(needs.positions, 2048)
    padded = 2 ** np.ceil(np.log2(alone))
    assert alone.sum() / padded.sum() < 0.8


@pytest.mark.parametrize("window", [1, 50, 10_000])
def test_every_epoch_has_every_sample_once_and_no_row_has_too_much(window: int) -> None:
    rng = np.random.default_rng(1)
    needs = Needs(rng.integers(1, 90, 500), rng.integers(0, 5, 500), np.zeros(500, int))
    needs.positions[7] = 1000  # alone in a row, and cut
    order = PackedOrder(needs, 64, 6, window, seed=0)
    for number in (0, 1):
        rows = order.epoch(number)
        assert sorted(itertools.chain(*rows)) == list(range(500))
        for row in map(list, rows):
            assert np.minimum(needs.positions, 64)[row].sum() <= 64
            assert needs.images[row].sum() <= 6
        assert [row for row in rows if 7 in row] == [(7,)]
    assert order.epoch(0) != order.epoch(1)


def test_any_row_is_known_without_those_before_it() -> None:
    needs = mix(300)
    order, again = (PackedOrder(needs, 1024, 8, 100, seed=5) for _ in range(2))
    ahead = [order[k] for k in range(200)]
    assert len(order.epoch(0)) < 100 < 200  # several epochs
    assert [again[k] for k in (199, 3, 150)] == [ahead[k] for k in (199, 3, 150)]
    other = PackedOrder(needs, 1024, 8, 100, seed=6)
    assert [other[k] for k in range(20)] != ahead[:20]


def test_what_cannot_be_read_takes_no_room() -> None:
    order = PackedOrder(Needs(*np.zeros((3, 9), int)), 64, 0, 4, seed=0)
    assert sorted(itertools.chain(*order.epoch(0))) == list(range(9))


@pytest.mark.parametrize("numbers", [(0, 1, 9), (64, -1, 9), (64, 1, 0)])
def test_numbers_that_allow_no_row_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be 1 or more"):
        PackedOrder(mix(10), *numbers, seed=0)


# --- Batches --------------------------------------------------------------------------------------

CFG = tiny.model("paper")
LAYOUT = BatchLayout.of(
    CFG, 1, buckets=Buckets((32, 128), (1,)), padding_side="right", max_length=120
)
PAGES = DigitsPages(DigitsConfig(page_size=30, turns=2), 40)
ENCODE = Encoder(
    build_tokenizer(),
    prompt_config("paper", "brief", 120),
    image_config("paper", tiny.VISION),
)


def packed(source: Any = PAGES, images: int = 4) -> PackedOrder:
    found = np.concatenate(list(needs_of(source, ENCODE.text, LAYOUT, range(len(source)))))
    return PackedOrder(as_needs(found), LAYOUT.max_length, images, 20, seed=0)


def batches(count: int, source: Any = PAGES, **changes: Any) -> list[Any]:
    options: dict[str, Any] = dict(batch_size=4, seed=0, first_step=0, packed=packed())
    options |= changes
    return list(itertools.islice(make_batches(source, ENCODE, LAYOUT, **options), count))


def test_needs_are_what_the_encoded_samples_take() -> None:
    needs = packed()._positions
    for number in range(len(PAGES)):
        example = ENCODE(PAGES[number])
        assert needs[number] == positions(example, LAYOUT.tokens_per_image)


def test_batches_hold_the_rows_of_the_order() -> None:
    order = packed()
    for step, (arrays, rejected) in enumerate(batches(3)):
        rows = [order[4 * step + b] for b in range(4)]
        assert not rejected and conversations_of(arrays) == sum(map(len, rows)) > 4
        inputs = arrays.inputs
        assert inputs.slots_BS.shape == (4, 128) and inputs.frames_BI.shape == (4, 4)
        for b, row in enumerate(rows):
            expected = [ENCODE(PAGES[number]) for number in row]
            assert inputs.frames_BI[b].sum() == len(row)
            ids = np.concatenate([example.ids for example in expected])
            assert (inputs.ids_BT[b, : len(ids)] == ids).all()
            assert (inputs.pixels_BIJYXC[b, 0] == expected[0].pixels[0]).all()


def test_a_run_goes_on_where_it_was_and_processes_share_its_rows() -> None:
    whole = batches(3)
    (later,) = batches(1, first_step=2)
    assert (later.arrays.inputs.ids_BT == whole[2].arrays.inputs.ids_BT).all()
    halves = [batches(1, process=p, processes=2)[0].arrays.inputs.ids_BT for p in range(2)]
    first = whole[0].arrays.inputs.ids_BT
    assert (halves[0] == first[::2]).all() and (halves[1] == first[1::2]).all()


class Broken:
    """Pages of which one has no answer and one too many images."""

    def __len__(self) -> int:
        return len(PAGES)

    def __getitem__(self, index):
        sample = PAGES[index]
        if index == 5:
            sample["conversations"] = []
        return sample

    def id_of(self, index):
        return f"page {index}"

    def dataset_of(self, index):
        return "pages"


def test_a_broken_sample_leaves_its_row_to_the_others() -> None:
    order = packed(Broken())
    place = next(k for k in range(40) if 5 in order[k])
    found = batches(place // 4 + 1, Broken(), packed=order)[-1]
    assert [rejected.id for rejected in found.rejected] == ["page 5"]
    row = [number for number in order[place] if number != 5]
    segments = found.arrays.inputs.packed.segments_BS[place % 4]
    assert segments.max() + 1 == max(1, len(row))


def test_a_sample_that_has_grown_since_it_was_counted_is_told_and_cuts_nobody() -> None:
    """Counted as nothing, as what cannot be read is, all of them are planned into one row."""
    needs = Needs(*np.zeros((3, len(PAGES)), int))
    order = PackedOrder(needs, LAYOUT.max_length, 4, 64, seed=0)
    found = batches(1, packed=order, batch_size=1)[0]
    assert all("needs more of a row than was counted" in told.reason for told in found.rejected)
    kept = conversations_of(found.arrays)
    assert kept <= 4 and kept + len(found.rejected) == len(order[0]) == len(PAGES)
    first = [ENCODE(PAGES[number]) for number in order[0][:kept]]
    learnt = sum(int((example.labels != -100).sum()) for example in first)
    assert (found.arrays.labels_BS != -100).sum() == learnt


def test_a_sample_with_more_images_than_a_row_has_is_told() -> None:
    films = DigitsPages(DigitsConfig(page_size=30, frames=3), 10)
    found = batches(1, films, packed=packed(films, images=2))[0]
    assert all("has 3 images or frames, and a packed row has room for 2" in r.reason
               for r in found.rejected)  # fmt: skip
    assert found.rejected


@pytest.mark.slow  # plans three epochs of 40,000 conversations
def test_what_a_conversation_of_the_mix_costs_at_7b() -> None:
    """The figures of docs/finetune.md: model FLOPs with padding, two fifths of a text fused."""
    (stage,) = stages_of(load_config(str(ROOT / "configs" / "stage2_vicuna_7b.py")))[-1:]
    needs = mix(40_000)
    needs = needs._replace(fused=needs.images * np.minimum(0.4 * needs.positions, 200).astype(int))
    found = {}
    for most in (10, 12):
        packing = PackingConfig(window=4096, images=most)
        ways = packing_plan.compare(dataclasses.replace(stage, packing=packing), needs)
        alone, found[most] = ways.values()
    assert alone.flops == pytest.approx(20.75e12, rel=2e-3) and round(alone.positions, 2) == 0.61
    assert found[10].flops == pytest.approx(16.65e12, rel=2e-3)
    assert found[12].flops == pytest.approx(17.47e12, rel=2e-3)
    assert [round(way.positions, 2) for way in found.values()] == [0.98, 0.99]


# --- What it would make of a run ------------------------------------------------------------------

CONFIG = """
import dataclasses
from tests.training import tiny_stages

def config():
    *_, stage2 = tiny_stages.stages()
    data = dataclasses.replace(stage2.data, samples=200)
    return dataclasses.replace(stage2, data=data, start="fresh", lengths=(32, 64, 96))
"""


def test_a_table_of_what_packing_would_make_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "pack.py"
    file.write_text(CONFIG)
    assert cli.main(["data", "packing", str(file), "--images", "4", "9", "--window", "64"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.match(
        r"stage2: 200 conversations of \d\d positions on average; full rows of 96", said[0]
    )
    alone, four, nine = (line.rsplit(maxsplit=4)[1:] for line in said[2:])
    rows, filled, images, work = zip(alone, four, nine, strict=True)
    assert int(rows[0]) == 200 and int(rows[1]) == int(rows[2]) < 110
    assert float(filled[1].rstrip("%")) > float(filled[0].rstrip("%"))
    # Room for images that nobody has is work for nothing.
    assert float(images[1].rstrip("%")) > float(images[2].rstrip("%"))
    assert float(work[1]) < float(work[2])


def test_a_stage_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "pack.py"
    file.write_text(CONFIG)
    assert cli.main(["data", "packing", str(file), "--stage", "stage3"]) == 2
    assert "has no stage stage3; give one of stage2" in capsys.readouterr().err
