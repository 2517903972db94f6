"""An engine against the release's own run of a video, frame by frame (golden case video_f5)."""

import jax
import numpy as np
import pytest

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.answer import MOST_TOP, Settings
from llava_mini_jax.inference.engine import Engine
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.lanes import Lanes
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.ticket import Medium, Piece, Request
from llava_mini_jax.inference.work import Work
from llava_mini_jax.reproduce import verify
from llava_mini_jax.weights.import_hf import load_params
from tests import tiny
from tests.conftest import ROOT

fast_compilation = tiny.fast_compilation

TOLERANCE = 2e-4  # the golden data's own for float32 forward passes


@pytest.fixture(scope="module")
def case():
    return verify.open_case(ROOT / "tests/golden/model/video_f5")


@pytest.mark.parametrize("chunk", [1, 2, 8, 32])
def test_frames_in_chunks_are_the_releases_frames_one_by_one(case, chunk, monkeypatch):
    params = load_params(case.bundle, case.published, dtype="float32", unrolled=True)
    model = Loaded(params, case.bundle, build_tokenizer(), bounds.buckets_for(case.bundle))
    frames = case.inputs["images"][0].transpose(0, 1, 3, 4, 2)  # normalised, [F, J, Y, X, C]
    ids_T = case.inputs["input_ids"][0].astype(np.int32)
    fuse_T, nothing = ids_T > 0, np.zeros(0)
    example = Example(ids_T, fuse_T, nothing, nothing, (len(frames),))
    engine = Engine(model, [LaneSize(1, 256)], timed=False, chunk=chunk)
    placed: list[Work] = []
    place = Lanes.place
    monkeypatch.setattr(Lanes, "place", lambda self, work: placed.append(work) or place(self, work))
    heard: list[Piece | Exception] = []
    settings = Settings(max_new_tokens=1, logprobs=MOST_TOP, ignore_end=True)
    medium = Medium(b"video", len(frames), lambda: iter(frames))
    engine.submit(Request(example, (medium,), settings), heard.append)
    while engine.step():
        pass

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

    (work,), golden = placed, case.outputs
    close(work.visual_VD, golden["compressed_tokens"].reshape(len(frames), -1))
    fused_TD = golden["fused_text"][:, 0].mean(axis=0)
    assert np.abs(fused_TD[fuse_T] - golden["fused_text"][0, 0][fuse_T]).max() > 0.01
    text_TD = np.asarray(work.text_BTD)[0, : len(ids_T)]
    close(text_TD[fuse_T], fused_TD[fuse_T])
    close(text_TD[ids_T >= 0], golden["inputs_embeds"][0][work.marks >= 0])
    piece = heard[0]
    assert isinstance(piece, Piece)
    ids, logprobs = zip(*piece.tokens[0].top, strict=True)
    assert len(ids) == MOST_TOP
    close(logprobs, np.asarray(jax.nn.log_softmax(golden["logits"][0, -1]))[list(ids)])
