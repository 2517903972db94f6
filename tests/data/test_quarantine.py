"""A run goes through broken samples of all kinds, names each once, and stops above its budget."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, collate
from llava_mini_jax.data.batches.pipeline import Encoder, Rejected, make_batches
from llava_mini_jax.data.batches.quarantine import Quarantine
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.order import make_order
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError

SAMPLES, BATCH, LENGTH = 1000, 8, 64
EPOCH = SAMPLES // BATCH
IMAGES = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=16))
ENCODE = Encoder(build_tokenizer(), prompt_config("paper", "brief", LENGTH), IMAGES)
LAYOUT = BatchLayout(
    tokens_per_image=1,
    buckets=Buckets(lengths=(16, 32, LENGTH), images=(1, 2)),
    max_length=LENGTH,
    padding_side="right",
)


def turns(question="<image>\nwhich digit?", answer="7", role="human"):
    return [{"from": role, "value": question}, {"from": "gpt", "value": answer}]


# One percent of the samples: row -> what stands there, and words of the reason; None for no fault.
BROKEN = {
    3: ({"image": "truncated.jpg", "conversations": turns()}, "truncated.jpg"),
    111: ({"image": "empty.jpg", "conversations": turns()}, "0 bytes"),
    222: ({"image": "animation.jpg", "conversations": turns()}, None),  # a GIF: its first frame
    333: ({"image": "missing.jpg", "conversations": turns()}, "there is no such file"),
    444: ('{"id": "row-444", "conversations": [', "line 445: not valid JSON"),
    555: ({"image": "good.jpg", "conversations": turns("which digit?")}, "0 times for 1 images"),
    666: ({"image": "good.jpg", "conversations": turns(answer="")}, "turn 2 is an empty answer"),
    777: ({"conversations": turns("which digit? " * 40)}, "none of its first 64 positions"),
    888: ({"video": "bad.mp4", "conversations": turns()}, "Cannot read the video"),
    999: ({"image": "good.jpg", "conversations": turns(role="robot")}, "turn 1 is"),
}
REASONS = {row: reason for row, (_, reason) in BROKEN.items() if reason is not None}
# A line that is not valid JSON has no id but its place.
REJECTED = {f"many-{row}" if row == 444 else f"row-{row}": why for row, why in REASONS.items()}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    folder = tmp_path_factory.mktemp("broken")
    picture = Image.effect_noise((24, 16), 50)
    picture.convert("RGB").save(folder / "good.jpg")
    picture.save(folder / "animation.gif", save_all=True, append_images=[picture.rotate(180)])
    (folder / "animation.gif").rename(folder / "animation.jpg")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "bad.mp4").write_bytes(b"\0" * 5000)
    lines = []
    for number in range(SAMPLES):
        good = {"image": "good.jpg"} if number % 3 else {}
        mark = "<image>\n" if good else ""
        row = good | {"conversations": turns(mark + "which digit? " * (number % 7 + 1))}
        row = BROKEN.get(number, (row,))[0]
        lines.append(row if isinstance(row, str) else json.dumps({"id": f"row-{number}"} | row))
    (folder / "many.jsonl").write_text("\n".join(lines))
    datasets = (Dataset(path=str(folder / "many.jsonl")),)
    return Samples(SourcesConfig(datasets=datasets, video=FrameSampling(fps=1.0, max_frames=2)))


def epoch(samples, **changes):
    options = dict(batch_size=BATCH, seed=5, first_step=0) | changes
    return list(itertools.islice(make_batches(samples, ENCODE, LAYOUT, **options), EPOCH))


@pytest.fixture(scope="module")
def whole(samples):
    return epoch(samples)


def test_every_broken_sample_is_named_once_and_no_other(whole):
    found = [rejected for batch in whole for rejected in batch.rejected]
    assert sorted(r.id for r in found) == sorted(REJECTED)
    for who, dataset, reason in found:
        assert dataset == "many" and REJECTED[who] in reason and "\n" not in reason


def test_good_rows_are_those_of_a_source_without_the_broken_samples(samples, whole):
    """Beside an empty row, the others are bit for bit what they are by themselves."""
    stream = make_order(samples, "none", BATCH, 5)
    order = np.array([stream[i] for i in range(SAMPLES)]).reshape(EPOCH, BATCH)
    for batch, indices in zip(whole, order, strict=True):
        broken = np.isin(indices, list(REASONS))
        if not broken.any():
            continue
        good = [ENCODE(samples[int(i)]) for i in indices[~broken]]
        alone = collate(good, LAYOUT, truncate=True)
        rows = jax.tree.map(lambda x, broken=broken: x[~broken], batch.arrays)
        jax.tree.map(np.testing.assert_array_equal, rows, alone)
        assert (batch.arrays.labels_BS[broken] == IGNORE).all()
        assert (batch.arrays.labels_BS[~broken] != IGNORE).any(axis=1).all()


@pytest.mark.parametrize(("processes", "threads"), [(2, 1), (4, 3), (8, 1)])
def test_any_number_of_processes_and_threads_rejects_the_same_at_the_same_step(
    samples, whole, processes, threads
):
    parts = [
        epoch(samples, process=p, processes=processes, threads=threads) for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        gathered = [rejected for part in parts for rejected in part[step].rejected]
        assert sorted(gathered) == sorted(batch.rejected)


# --- The file -------------------------------------------------------------------------------------


def rejected(*names, dataset="a"):
    return tuple(Rejected(name, dataset, f"{name} is cut short.") for name in names)


def opened(folder: Path, *, stage="stage1", total=1000, budget=0.01, first_step=0, write=True):
    path = epath.Path(folder) / "quarantine.jsonl"
    return Quarantine(path, stage, total, budget, first_step, write=write)


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_no_file_while_all_is_good(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add(1, ())
    assert len(quarantine) == 0 and not any(tmp_path.iterdir())


def test_a_sample_is_written_once_for_each_stage(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add(2, rejected("x", 7))
    quarantine.add(9, rejected("x", "7") + rejected("x", dataset="b"))
    opened(tmp_path, stage="stage2").add(1, rejected("x"))
    found = [(x["stage"], x["step"], x["dataset"], x["id"]) for x in lines(tmp_path)]
    assert found == [
        ("stage1", 2, "a", 7),
        ("stage1", 2, "a", "x"),
        ("stage1", 9, "a", "7"),
        ("stage1", 9, "b", "x"),
        ("stage2", 1, "a", "x"),
    ]
    assert lines(tmp_path)[0] == {
        "stage": "stage1", "step": 2, "id": 7, "dataset": "a", "reason": "7 is cut short."
    }  # fmt: skip


def test_above_the_budget_the_run_stops_with_the_list(tmp_path):
    quarantine = opened(tmp_path, budget=0.003)
    quarantine.add(1, rejected("x", "y", "z"))  # 3 of 1000 are as many as are allowed
    quarantine.add(2, rejected("x"))
    with pytest.raises(InputError) as caught:
        quarantine.add(3, rejected("v", "w"))
    message = str(caught.value)
    assert "stage1: 5 of 1000 samples are broken, but bad_samples allows 0.3 %" in message
    assert "'x' (x is cut short); " in message and " and 2 more. " in message
    assert "quarantine.jsonl" in message and "llava-mini data verify" in message
    assert {x["id"] for x in lines(tmp_path)} == set("vwxyz")  # all of them, before it stops
    with pytest.raises(InputError, match="5 of 1000"):  # and again where the file says so already
        opened(tmp_path, budget=0.003, first_step=3)
    assert len(opened(tmp_path, budget=0.003, first_step=2)) == 3


def test_a_killed_and_continued_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    found = {1: rejected("a", "b"), 4: rejected("c"), 5: rejected("d"), 6: rejected("e", "a")}

    def run(folder, first_step, last_step):
        quarantine = opened(folder, stage="stage2", first_step=first_step)
        for step in range(first_step + 1, last_step + 1):
            quarantine.add(step, found.get(step, ()))
        return quarantine

    for folder in ("whole", "killed"):
        opened(tmp_path / folder).add(30, rejected("z"))  # the stage before
    assert len(run(tmp_path / "whole", 0, 6)) == 5
    run(tmp_path / "killed", 0, 5)  # with a checkpoint at step 4
    with (tmp_path / "killed" / "quarantine.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "st')
    assert len(run(tmp_path / "killed", 4, 6)) == 5
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["quarantine.jsonl"]


def test_processes_that_do_not_write_count_alike(tmp_path):
    writer = opened(tmp_path, budget=0.001)
    reader = opened(tmp_path, budget=0.001, write=False)
    for quarantine in (reader, writer):
        quarantine.add(1, rejected("x"))
        with pytest.raises(InputError, match="2 of 1000"):
            quarantine.add(2, rejected("y"))
    assert [x["id"] for x in lines(tmp_path)] == ["x", "y"]
    before = (tmp_path / "quarantine.jsonl").read_bytes()
    assert len(opened(tmp_path, first_step=1, write=False)) == 1
    assert (tmp_path / "quarantine.jsonl").read_bytes() == before


def test_another_file_of_that_name_is_not_overwritten(tmp_path):
    (tmp_path / "quarantine.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(InputError, match=r"has the line \{'id': 3\}"):
        opened(tmp_path)
    assert (tmp_path / "quarantine.jsonl").read_text() == '{"id": 3}\n'
