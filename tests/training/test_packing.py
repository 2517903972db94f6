"""Packed rows: the loss and the gradients of the same conversations, each in a row of its own."""

import dataclasses

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example, collate
from llava_mini_jax.data.batches.packed import collate_packed, conversations_of
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from tests import tiny, tiny_compressors

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
    "holes": tiny.model(
        "paper", compressor=tiny_compressors.METHODS["prumerge"], prefusion_layers=1
    ),
    "a few frames at a time": tiny.model("paper", remat="full"),
}


def conversations(cfg: LlavaMiniConfig) -> list[Example]:
    """Of every kind, with answers of other lengths."""
    unmarked = tiny.example(4, 8, {}, cfg, answer=2)
    picture = tiny.example(5, 7, {1: 1}, cfg, answer=3)
    return [
        tiny.example(0, 9, {2: 1}, cfg, answer=4),
        tiny.example(1, 6, {}, cfg, answer=5),
        tiny.example(2, 12, {1: 1, 5: 1}, cfg, answer=4),
        tiny.example(3, 7, {3: 3}, cfg, answer=2),
        # A picture without a place in the text (the release's blank one).
        dataclasses.replace(unmarked, pixels=picture.pixels, frames=picture.frames),
        picture,
    ]


ROWS = [[0, 1, 2], [5, 3], [4]]


def layout(cfg: LlavaMiniConfig, length: int) -> BatchLayout:
    buckets = Buckets(lengths=(length,), images=(1, 2, 4, 8, 16))
    return BatchLayout.of(cfg, 1, buckets=buckets, padding_side="right", max_length=length)


@pytest.mark.parametrize("name", MODELS)
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
