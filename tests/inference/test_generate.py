"""Generation: the cache equals recomputing everything, a batch equals its rows alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.data.batches.examples import Buckets, Example
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import generate
from llava_mini_jax.inference.sampling import Sampling, make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from tests import tiny

fast_compilation = tiny.fast_compilation

# The same float32 sums over other paddings, with logits of order 5: the worst seen is 1e-5.
LOGITS_ATOL = 1e-4

BUCKETS = Buckets(lengths=(32, 64), images=(4,))
ROOM = 6


def mixed(cfg: LlavaMiniConfig, seed: int = 0) -> list[Example]:
    """A picture, two pictures, text alone, and a video of three frames."""
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


def start(cfg, examples, side="right") -> generate.Decoding:
    params = weights(cfg)
    return generate.encode_and_prefill(
        params, cfg, examples, BUCKETS, cfg.llm.max_positions, side, ROOM
    )


def answer(cfg, examples, sampling=None, side="right") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [B, n], the logits that they were chosen from [B, n, V], which rows are done)."""
    params = weights(cfg)
    state = start(cfg, examples, side)
    sampling = sampling or Sampling.greedy(len(examples), ())
    logits = []
    for step in range(ROOM):
        if bool(state.done_B.all()):
            break
        logits.append(np.asarray(state.logits_BV))
        state = generate.decode(params, state, sampling, jnp.int32(step + 1), cfg)
    tokens = np.asarray(state.tokens_BN)[:, : len(logits)]
    return tokens, np.stack(logits, axis=1), np.asarray(state.done_B)


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


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mixed_batch_equals_its_rows_alone(case, side: str) -> None:
    cfg, examples, tokens, logits = case
    if side == "left":
        found, found_logits, _ = answer(cfg, examples, side="left")
        assert found.tolist() == tokens.tolist()
        np.testing.assert_allclose(found_logits, logits, atol=LOGITS_ATOL)
    # Every kind of row with one model, the video with the others: each number of frames compiles.
    for row in range(4) if cfg is MODELS["release"] else [3]:
        alone, alone_logits, _ = answer(cfg, [examples[row]], side=side)
        assert alone[0].tolist() == tokens[row].tolist()
        np.testing.assert_allclose(alone_logits[0], logits[row], atol=LOGITS_ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_thirty_two_rows_equal_the_rows_alone(side: str) -> None:
    cfg = tiny.release_model()
    examples = [example for seed in range(0, 80, 10) for example in mixed(cfg, seed)]
    params = weights(cfg)
    state = start(cfg, examples, side)
    state = generate.decode(params, state, Sampling.greedy(32, ()), jnp.int32(ROOM), cfg)
    for row, example in enumerate(examples):
        alone = answer(cfg, [example])[0]
        assert alone[0].tolist() == state.tokens_BN[row].tolist()


def test_stop_ids_end_rows_one_by_one(case) -> None:
    cfg, examples, tokens, logits = case
    stop = int(tokens[0, 2])
    ends = [row.index(stop) if stop in row else ROOM for row in tokens.tolist()]
    assert min(ends) <= 2 and max(ends) > 2, "some row goes on"
    found, found_logits, done = answer(cfg, examples, Sampling.greedy(4, (63, stop)))
    for row, end in enumerate(ends):
        kept = found[row, : end + 1].tolist()
        if 63 not in kept:  # the other stop token may have come first
            assert kept == tokens[row, : end + 1].tolist()
            np.testing.assert_allclose(
                found_logits[row, : end + 1], logits[row, : end + 1], atol=LOGITS_ATOL
            )
            assert done[row] == (end < ROOM)


def test_decoding_ends_when_every_row_is_done() -> None:
    cfg = tiny.release_model()
    examples = mixed(cfg)
    params = weights(cfg)
    first = [int(row[0]) for row in answer(cfg, examples)[0]]
    state = start(cfg, examples)
    state = generate.decode(params, state, Sampling.greedy(4, tuple(first)), jnp.int32(ROOM), cfg)
    assert int(state.step) == 1 and bool(state.done_B.all())
    assert state.tokens_BN[:, 0].tolist() == first


def test_tokens_in_one_call_are_those_of_one_call_each(case) -> None:
    cfg, examples, tokens, _ = case
    params = weights(cfg)
    state = start(cfg, examples)
    state = generate.decode(params, state, Sampling.greedy(4, ()), jnp.int32(ROOM), cfg)
    assert state.tokens_BN.tolist() == tokens.tolist() and int(state.step) == ROOM


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


def programs() -> dict[str, int]:
    names = ("embed_text", "encode_frames", "prefill", "decode")
    return {name: getattr(generate, name)._cache_size() for name in names}


def test_other_lengths_contents_and_settings_compile_nothing() -> None:
    cfg = tiny.release_model()
    answer(cfg, mixed(cfg), make_sampling(4, 1.0, 0.9, 0, 1, (3,)))
    before = programs()
    assert all(before.values()), "the counter sees these functions"
    for seed in range(10, 14):
        examples = mixed(cfg, seed)
        examples[0] = tiny.example(seed, 4 + seed, {0: 1}, cfg)  # 6 frames in all, as before
        examples = examples[seed % 4 :] + examples[: seed % 4]
        settings = make_sampling(4, 0.1 * seed, 0.5, seed, seed, (seed, 2 * seed))
        answer(cfg, examples, settings, side="left" if seed % 2 else "right")
    answer(cfg, mixed(cfg), Sampling.greedy(4, ()))
    assert programs() == before


def test_frames_come_in_chunks_of_few_sizes() -> None:
    cfg = tiny.release_model()
    for counts in [(1,), (2, 1), (5, 0, 4), (8,), (9, 8), (0,)]:
        examples = [tiny.example(i, 4, {0: n} if n else {}, cfg) for i, n in enumerate(counts)]
        seen = []
        for pixels, rows, numbers in generate.frame_chunks(examples):
            assert len(pixels) == len(rows) == len(numbers) and len(rows) in generate.FRAME_CHUNKS
            for picture, row, number in zip(pixels, rows, numbers, strict=True):
                if row < len(examples):
                    np.testing.assert_array_equal(picture, examples[row].pixels[number])
                    seen.append((int(row), int(number)))
        assert seen == [(row, i) for row, n in enumerate(counts) for i in range(n)]


def test_a_prompt_that_does_not_fit() -> None:
    cfg = tiny.release_model()
    long = tiny.example(0, 70, {1: 1}, cfg)
    params = weights(cfg)
    with pytest.raises(InputError, match="70 positions"):
        generate.encode_and_prefill(params, cfg, [long], BUCKETS, 69, "right", ROOM)
    with pytest.raises(InputError, match="largest bucket has 64"):
        generate.encode_and_prefill(params, cfg, [long], BUCKETS, 100, "right", ROOM)
