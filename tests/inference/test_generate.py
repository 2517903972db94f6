"""Answers token by token: the cache equals recomputing everything, rows equal themselves alone, and
the engine draws the same tokens."""

import functools

import numpy as np
import pytest

from llava_mini_jax.data.batches.examples import Buckets, Example
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.inference import engine
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.sampling import Sampling, make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.reproduce import stepwise
from tests import tiny

fast_compilation = tiny.fast_compilation

# The same float32 sums over other paddings, with logits of order 5: the worst seen is 1e-5.
LOGITS_ATOL = 1e-4

BUCKETS = Buckets(lengths=(32, 64), images=(4,))
ROOM = 6


def mixed(cfg: LlavaMiniConfig, seed: int = 0) -> list[Example]:
    """An image, two images, text alone, and a video of three frames."""
    return [
        tiny.example(seed + 1, 9, {3: 1}, cfg),
        tiny.example(seed + 2, 12, {1: 1, 6: 1}, cfg),
        tiny.example(seed + 3, 5, {}, cfg),
        tiny.example(seed + 4, 7, {0: 3}, cfg),
    ]


@functools.cache
def weights(cfg: LlavaMiniConfig) -> LlavaMini:
    # Of the first seeds, the one whose answers repeat themselves least.
    return llava_mini.unrolled(tiny.on_device(tiny.weights(cfg, seed=9)))


def loaded(cfg: LlavaMiniConfig) -> Loaded:
    return tiny.loaded(cfg, weights(cfg), BUCKETS)


def answer(cfg, examples, sampling=None) -> stepwise.Answers:
    sampling = sampling or Sampling.greedy(len(examples), ())
    return stepwise.answers(loaded(cfg), examples, sampling, ROOM)


MODELS = {
    "release": tiny.release_model(),
    "paper": tiny.model("paper"),
}


@pytest.fixture(
    scope="module",
    params=["release", "paper"],
)
def case(request):
    cfg = MODELS[request.param]
    examples = mixed(cfg)
    return cfg, examples, *answer(cfg, examples)[:2]


def test_decoding_with_a_cache_equals_recomputing_everything(case) -> None:
    cfg, examples, tokens, logits = case
    assert len(np.unique(tokens)) > 2 * len(examples), "answers of different tokens"
    for step in range(ROOM):
        # The answer so far as text behind the question that takes no part in pre-fusion.
        longer = [
            Example(
                np.concatenate([e.ids, row[:step]]),
                np.concatenate([e.fuse, np.zeros(step, bool)]),
                np.full(len(e.ids) + step, IGNORE, np.int32),
                e.pixels,
                e.frames,
            )
            for e, row in zip(examples, tokens, strict=True)
        ]
        inputs = tiny.batch(longer, cfg, buckets=BUCKETS).inputs
        last = (inputs.slots_BS >= 0).sum(axis=1) - 1
        whole = np.asarray(tiny.logits(weights(cfg), inputs, cfg))
        expected = whole[np.arange(len(examples)), last]
        np.testing.assert_allclose(logits[:, step], expected, atol=LOGITS_ATOL)
        assert expected.argmax(-1).tolist() == tokens[:, step].tolist()


def test_rows_of_any_kind_equal_the_rows_alone(case) -> None:
    cfg, examples, tokens, logits = case
    # Every kind of row with one model, the video with the others: each number of frames compiles.
    for row in range(4) if cfg is MODELS["release"] else [3]:
        alone = answer(cfg, [examples[row]])
        assert alone.tokens_BN[0].tolist() == tokens[row].tolist()
        np.testing.assert_allclose(alone.logits_BNV[0], logits[row], atol=LOGITS_ATOL)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 4, 64])
def test_the_engine_draws_the_same_tokens(case, slots: int, steps: int) -> None:
    cfg, examples, tokens, _ = case
    heard: list[list[int]] = [[] for _ in examples]
    settings = [Settings(max_new_tokens=ROOM, ignore_end=True)] * len(examples)
    hear = lambda number, piece: heard[number].extend(piece.ids)  # noqa: E731
    for _ in engine.answering(loaded(cfg), examples, settings, slots, hear, steps=steps):
        pass
    assert heard == tokens.tolist()


@pytest.mark.slow
def test_thirty_two_rows_equal_the_rows_alone() -> None:
    cfg = tiny.release_model()
    examples = [example for seed in range(0, 80, 10) for example in mixed(cfg, seed)]
    together = answer(cfg, examples)
    for row, example in enumerate(examples):
        alone = answer(cfg, [example])
        assert alone.tokens_BN[0].tolist() == together.tokens_BN[row].tolist()


def test_stop_ids_end_rows_one_by_one(case) -> None:
    cfg, examples, tokens, logits = case
    stop = int(tokens[0, 2])
    ends = [row.index(stop) if stop in row else ROOM for row in tokens.tolist()]
    assert min(ends) <= 2 and max(ends) > 2, "some row goes on"
    found = answer(cfg, examples, Sampling.greedy(4, (63, stop)))
    for row, end in enumerate(ends):
        kept = found.tokens_BN[row, : end + 1].tolist()
        if 63 not in kept:  # the other stop token may have come first
            assert kept == tokens[row, : end + 1].tolist()
            np.testing.assert_allclose(
                found.logits_BNV[row, : end + 1], logits[row, : end + 1], atol=LOGITS_ATOL
            )
            assert found.ended_B[row] == (end < ROOM)


def test_it_ends_when_every_row_has_met_a_stop_token() -> None:
    cfg = tiny.release_model()
    examples = mixed(cfg)
    first = answer(cfg, examples).tokens_BN[:, 0].tolist()
    found = answer(cfg, examples, Sampling.greedy(4, tuple(first)))
    assert found.tokens_BN.tolist() == [[token] for token in first] and found.ended_B.all()


def test_sampled_rows_draw_as_they_would_alone() -> None:
    cfg = tiny.release_model()
    examples = mixed(cfg)
    together, _, _ = answer(cfg, examples, make_sampling(4, 1.5, 0.95, 30, 5, ()))
    again, _, _ = answer(cfg, examples, make_sampling(4, 1.5, 0.95, 30, 5, ()))
    assert together.tolist() == again.tolist()
    greedy = answer(cfg, examples)[0]
    assert together.tolist() != greedy.tolist()
    for row, example in enumerate(examples):
        alone, _, _ = answer(cfg, [example], make_sampling(1, 1.5, 0.95, 30, 5, ()))
        assert alone[0].tolist() == together[row].tolist()
    tops = answer(cfg, examples, make_sampling(4, 1.5, 1.0, 1, 5, ()))[0]
    assert tops.tolist() == greedy.tolist()
