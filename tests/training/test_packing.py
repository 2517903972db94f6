"""Packed rows: the loss and the gradients of the same conversations, each in a row of its own."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example, collate
from llava_mini_jax.data.batches.packed import collate_packed, conversations_of
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.packing import PackingConfig
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.training.first_step import likely_batch
from llava_mini_jax.training.stages import TrainConfig, _packing
from tests import tiny
from tests.tiny_compressors import METHODS
from tests.training import tiny_stages
from tests.training.runs import assert_same, metric_lines, metrics_of, run

fast_compilation = tiny.fast_compilation

# Float32: sums in another order, and rotations by other angles of the same differences.
TOLERANCE = 1e-5
D = tiny.LLM.width
MODELS: dict[str, LlavaMiniConfig] = {
    "paper": tiny.model("paper"),
    "release": tiny.release_model(),
    "llava-1.5": tiny.model("llava-1.5"),
    "a window": tiny.model("paper", dataclasses.replace(tiny.LLM, window=7)),
    "nested": tiny.model(
        "paper",
        compressor=NestedConfig(way="separate", width=D, counts=(0, 1, 4), count=4),
    ),
    "holes": tiny.model("paper", compressor=METHODS["prumerge"], prefusion_layers=1),
    "a few frames at a time": tiny.model("paper", remat="full"),
}
QUICK = {"release", "a window", "holes"}  # a model to compile each


def conversations(cfg: LlavaMiniConfig) -> list[Example]:
    """Of every kind, with answers of other lengths."""
    unmarked = tiny.example(4, 8, {}, cfg, answer=2)
    picture = tiny.example(5, 7, {1: 1}, cfg, answer=3)
    return [
        tiny.example(0, 9, {2: 1}, cfg, answer=4),
        tiny.example(1, 6, {}, cfg, answer=5),
        tiny.example(2, 12, {1: 1, 5: 1}, cfg, answer=4),
        tiny.example(3, 7, {3: 3}, cfg, answer=2),
        # An image without a place in the text (the release's blank one).
        dataclasses.replace(unmarked, pixels=picture.pixels, frames=picture.frames),
        picture,
    ]


ROWS = [[0, 1, 2], [5, 3], [4]]


def layout(cfg: LlavaMiniConfig, length: int) -> BatchLayout:
    buckets = Buckets(lengths=(length,), images=(1, 2, 4, 8, 16))
    return BatchLayout.of(cfg, 1, buckets=buckets, padding_side="right", max_length=length)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_loss_and_gradients_are_those_of_rows_of_their_own(name: str) -> None:
    cfg, rows = MODELS[name], ROWS
    examples = conversations(cfg)
    if name == "a few frames at a time":
        examples.append(tiny.example(6, 10, {2: 11}, cfg, answer=3))
        rows = [[0, 6], [1, 2, 5], [3, 4]]
    images = max(sum(len(examples[n].pixels) for n in row) for row in rows)
    wide, params = layout(cfg, 96), tiny.on_device(tiny.weights(cfg))
    single = collate(examples, wide, truncate=False)
    packed = collate_packed([[examples[n] for n in row] for row in rows], wide, images)
    assert conversations_of(packed) == len(examples) == conversations_of(single)
    assert (packed.labels_BS != IGNORE).sum() == (single.labels_BS != IGNORE).sum() >= 20
    wanted, wanted_grads = jax.device_get(tiny.loss_and_grads(params, single, cfg))
    value, grads = jax.device_get(tiny.loss_and_grads(params, packed, cfg))
    np.testing.assert_allclose(value, wanted, rtol=TOLERANCE)
    found = param_tree.paths(grads)
    for path, expected in param_tree.paths(wanted_grads).items():
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found[path], expected, atol=TOLERANCE * scale, err_msg=path)
    touched = {path.split("/")[0] for path, grad in found.items() if np.abs(grad).max() > 1e-4}
    assert {"projector", "llm", "vision"} <= touched


# --- Runs -----------------------------------------------------------------------------------------

PACKED = PackingConfig(window=64, images=4)


def stage(**changes: Any) -> TrainConfig:
    *_, stage2 = tiny_stages.stages()
    data = dataclasses.replace(stage2.data, samples=60)
    own = dict(start="fresh", steps=4, log_every=1, data=data, packing=PACKED, keep=10)
    return dataclasses.replace(stage2, **own | changes)


@pytest.mark.slow
def test_a_packed_run_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = run([stage()], tmp_path / "whole")
    told = capsys.readouterr().err
    # A page and two questions are 40 positions or more; rows have 96.
    assert re.search(r"60 conversations are packed into \d\d rows of 96 positions, \d\d", told)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / "stage2" / "4")
    shutil.rmtree(half / "stage2")
    finals = run([stage()], half)
    assert_same(finals["stage2"].params, whole["stage2"].params)
    assert metrics_of(half) == metrics_of(tmp_path / "whole")
    lines = [line for line in metric_lines(half) if "loss" in line]
    assert len(lines) == 4 and whole["stage2"].compiled == 1


def test_a_step_is_planned_as_packed_batches_are_made() -> None:
    """What --dry-run, profile compile and the first step's thread compile beforehand."""
    made = stage()
    planned = likely_batch(made)
    page = tiny.example(0, 20, {2: 1}, made.model, answer=2)
    page = dataclasses.replace(page, pixels=np.zeros((1, 1, 30, 30, 3), np.uint8))
    rows = [[page, page, page]] * made.batch_size
    found = collate_packed(rows, layout(made.model, 96), PACKED.images)
    wanted = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(planned)]
    made_of = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)]
    # The text that an image is fused with is a guess, a quarter of a row.
    differ = [n for n, pair in enumerate(zip(wanted, made_of, strict=True)) if len({*pair}) > 1]
    assert len(differ) <= 1 and jax.tree.structure(planned) == jax.tree.structure(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=tiny.model("paper", compressor=METHODS["voco"], prefusion_layers=0)), "inside"),
        (dict(draw_tokens=(0, 1, 4), model=MODELS["nested"]), "leave out draw_tokens"),
        (dict(prompt="left"), "set prompt.padding_side to right"),
        (dict(data="grouped"), 'set data.grouping to "none", not "modality"'),
    ],
)
def test_what_does_not_go_with_packed_rows_is_refused(change: dict, message: str) -> None:
    made = stage(packing=PackingConfig(window=4096, images=4))
    if change.get("prompt"):
        change = dict(prompt=dataclasses.replace(made.prompt, padding_side="left"))
    if change.get("data"):
        sampling = FrameSampling(fps=1.0, max_frames=None)
        files = (Dataset(path="a.json"),)
        change = dict(data=SourcesConfig(datasets=files, video=sampling, grouping="modality"))
    with pytest.raises(InputError, match=message):
        for mistake in _packing(dataclasses.replace(made, **change)):
            raise InputError(mistake)
