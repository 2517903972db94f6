"""The loop that chunks are timed against gives what chunks give; the arithmetic of the table."""

import jax
import numpy as np
import pytest

from llava_mini_jax.cost.video_speed import (
    CHUNKED,
    EAGER,
    FOLLOW_UP,
    LOOP,
    Speed,
    measure,
    one_frame,
)
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import seeing_programs
from llava_mini_jax.models import llava_mini
from tests import tiny

fast_compilation = tiny.fast_compilation
ATOL = 2e-4


def model(dialect):
    cfg = tiny.model(dialect)
    return llava_mini.unrolled(tiny.on_device(tiny.weights(cfg))), cfg


def frames(cfg, count):
    side = cfg.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (count, 1, side, side, 3), np.uint8)


@pytest.mark.parametrize("dialect", ["paper", "release"])
def test_a_frame_of_the_loop_is_a_frame_of_a_chunk(dialect):
    params, cfg = model(dialect)
    pixels, rng = frames(cfg, 2), np.random.default_rng(1)
    text_TD = rng.standard_normal((5, cfg.llm.width)).astype(np.float32)
    visual, memory = seeing_programs.prefuse_images(
        params, seeing_programs.encode_vision(params, pixels, cfg), cfg
    )
    total = seeing_programs.prefuse_text(
        params, 0 * text_TD, memory, np.int32(2), text_TD[None], cfg
    )
    alone = [jax.jit(one_frame, static_argnames="cfg")(params, x, text_TD, cfg) for x in pixels]
    for chunked, (single, _) in zip(visual.tokens_IQE, alone, strict=True):
        np.testing.assert_allclose(chunked, single, atol=ATOL)
    np.testing.assert_allclose(total, alone[0][1] + alone[1][1], atol=2 * ATOL)
    found = measure(params, cfg, pixels, text=5, chunk=2, repeats=1)
    assert set(found.seconds) == {*CHUNKED, LOOP, EAGER, FOLLOW_UP}


def test_ratios_are_medians_over_repetitions():
    first, second = CHUNKED
    speed = Speed({first: (1.0, 2.0, 1.0), second: (1.0, 2.0, 3.0), LOOP: (8.0, 8.0, 8.0)})
    assert speed.median(first, second) == 4.0 and speed.ratio(LOOP, first, second) == 2.0


def test_mistakes():
    params, cfg = model("paper")
    with pytest.raises(InputError, match="2 frames in chunks of 3"):
        measure(params, cfg, frames(cfg, 2), text=1, chunk=3, repeats=1)
    params, cfg = model("llava-1.5")
    with pytest.raises(InputError, match="without pre-fusion"):
        measure(params, cfg, frames(cfg, 2), text=1, chunk=1, repeats=1)
