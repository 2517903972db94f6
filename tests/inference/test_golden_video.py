"""A session against the release's own run of a video, frame by frame (golden case video_f5)."""

from types import SimpleNamespace

import numpy as np
import pytest

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.session_media import Medium
from llava_mini_jax.reproduce import verify
from llava_mini_jax.weights.import_hf import load_params
from tests.conftest import ROOT

TOLERANCE = 2e-4  # the golden data's own for float32 forward passes


@pytest.fixture(scope="module")
def case():
    return verify.open_case(ROOT / "tests/golden/model/video_f5")


@pytest.mark.parametrize("chunk", [1, 2, 8, 32])
def test_frames_in_chunks_are_the_releases_frames_one_by_one(case, chunk):
    params = load_params(case.bundle, case.published, dtype="float32", unrolled=True)
    buckets = bounds.buckets_for(case.bundle)
    model = SimpleNamespace(bundle=case.bundle, params=params, buckets=buckets)
    model.with_stop_text = lambda settings: settings
    session = Session(model, chunk=chunk)
    frames = case.inputs["images"][0].transpose(0, 1, 3, 4, 2)  # normalised, [F, J, Y, X, C]
    session._watched.media.append(Medium(iter(frames), len(frames)))
    ids_T = case.inputs["input_ids"][0].astype(np.int32)
    fuse_T = ids_T > 0

    nothing = np.zeros(0)
    text_BTD = session._fused_text(Example(ids_T, fuse_T, nothing, nothing, (len(frames),)))
    prompt_S = session._marks(ids_T, fuse_T)
    logits_BV = session._prefill(text_BTD, prompt_S, np.flatnonzero(ids_T >= 0), room=8)

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

    golden = case.outputs
    close(session._watched.visual(), golden["compressed_tokens"].reshape(len(frames), -1))
    fused_TD = golden["fused_text"][:, 0].mean(axis=0)
    assert np.abs(fused_TD[fuse_T] - golden["fused_text"][0, 0][fuse_T]).max() > 0.01
    text_TD = np.asarray(text_BTD)[0, : len(ids_T)]
    close(text_TD[fuse_T], fused_TD[fuse_T])
    close(text_TD[ids_T >= 0], golden["inputs_embeds"][0][prompt_S >= 0])
    close(np.asarray(logits_BV)[0], golden["logits"][0, -1])
