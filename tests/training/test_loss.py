"""The loss against the same arithmetic in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models import llama
from llava_mini_jax.training.loss import hidden_sums, logit_sums, loss, next_token_loss
from tests import tiny

fast_compilation = tiny.fast_compilation

# Float32 sums of a few hundred terms of size 1 to 100.
RELATIVE = 1e-6


def expected(logits, targets):
    """(mean, how many, how many right): log-softmax at every supervised target, one by one."""
    logits = logits.astype(np.float64)
    losses, right = [], 0
    for row, targets_of_row in zip(logits, targets, strict=True):
        for scores, target in zip(row, targets_of_row, strict=True):
            if target != IGNORE:
                losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max())
                losses[-1] -= scores[target]
                right += int(scores.argmax() == target)
    return np.mean(losses) if losses else 0.0, len(losses), right


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_cross_entropy_counts_supervised_targets_only(spread):
    rng = np.random.default_rng(0)
    logits = (spread * rng.standard_normal((3, 7, 11))).astype(np.float32)
    targets = rng.integers(0, 11, (3, 7)).astype(np.int32)
    targets[0, :3] = IGNORE
    targets[1] = IGNORE
    targets[2, :4] = logits[2, :4].argmax(-1)  # said right
    value, sums = jax.jit(next_token_loss)(logits, targets)
    mean, tokens, right = expected(logits, targets)
    assert tokens == 11 and right >= 4
    np.testing.assert_allclose(value, mean, rtol=RELATIVE)
    assert (int(sums["tokens"]), int(sums["right_tokens"])) == (tokens, right)


def test_without_a_supervised_token_loss_and_gradient_are_zero():
    targets = jnp.full((2, 5), IGNORE)
    logits = jnp.ones((2, 5, 11))
    loss_and_gradient = jax.jit(jax.value_and_grad(next_token_loss, has_aux=True))
    (value, sums), gradient = loss_and_gradient(logits, targets)
    assert (float(value), int(sums["tokens"]), int(sums["right_tokens"])) == (0.0, 0, 0)
    assert (gradient == 0).all()  # and not NaN


def test_the_model_is_asked_for_the_token_that_comes_next():
    cfg = tiny.model("paper")
    batch = tiny.training_batch(cfg)
    params = tiny.on_device(tiny.weights(cfg))

    @jax.jit
    def both(params, batch):
        return loss(params, batch, cfg), tiny.logits(params, batch.inputs, cfg)

    (value, sums), logits = jax.device_get(both(params, batch))
    mean, tokens, right = expected(logits[:, :-1], batch.labels_BS[:, 1:])
    assert tokens == (batch.labels_BS != IGNORE).sum() > 10
    np.testing.assert_allclose(value, mean, rtol=RELATIVE)
    assert (int(sums["tokens"]), int(sums["right_tokens"])) == (tokens, right)
    unshifted, _, _ = expected(logits, batch.labels_BS)
    assert abs(mean - unshifted) > 0.01 * mean


# --- A chunk of positions at a time ---------------------------------------------------------------


def head_and_hidden(vocabulary, width, rows, positions):
    """(a language model that is its head alone, hidden states, targets): half are supervised."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((vocabulary, width)).astype(np.float32) / np.sqrt(width)
    x_BSD = rng.standard_normal((rows, positions, width)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (rows, positions)).astype(np.int32)
    targets[rng.random(targets.shape) < 0.5] = IGNORE
    return (
        llama.Llama(embed_tokens=None, layers=None, final_norm=None, lm_head=head),
        x_BSD,
        targets,
    )


def total_and_gradients(chunk):
    def total(llm, x_BSD, targets_BS):
        sums = hidden_sums(llm, x_BSD, targets_BS, chunk)
        return sums["cross_entropy"] + 0.1 * sums["z_loss"], sums

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [1, 4, 5, 9, 11, 12])  # dividing 10 or not, and beyond it
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_chunks_give_the_same_sums_and_gradients(chunk, tied):
    llm, *arrays = head_and_hidden(40, 8, 3, 10)
    if tied:
        llm = llama.Llama(embed_tokens=llm.lm_head, layers=None, final_norm=None, lm_head=None)
    (_, sums), gradients = total_and_gradients(0)(llm, *arrays)
    (_, found_sums), found = total_and_gradients(chunk)(llm, *arrays)
    assert 5 < sums["tokens"] < 30
    for name, value in sums.items():
        np.testing.assert_allclose(found_sums[name], value, rtol=RELATIVE, err_msg=name)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True)
    for ours, theirs in pairs:
        # Up to 30 float32 terms in another order.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_chunks_need_a_fraction_of_the_memory():
    """What XLA sets aside besides arguments and results, for float32 logits of 64 MiB."""
    arguments = head_and_hidden(2**15, 8, 4, 128)

    def temporary(chunk):
        compiled = total_and_gradients(chunk).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, chunked = temporary(0), temporary(8)
    assert whole >= 2**26  # they are all there
    assert chunked < whole / 8


def test_the_z_loss_is_the_mean_square_of_the_normaliser():
    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal((2, 5, 11))).astype(np.float32)
    targets = rng.integers(0, 11, (2, 5)).astype(np.int32)
    targets[0, 2:] = IGNORE
    normalisers = np.log(np.exp(logits.astype(np.float64)).sum(-1))[targets != IGNORE]
    sums = jax.jit(logit_sums)(logits, targets)
    assert int(sums["tokens"]) == 7
    np.testing.assert_allclose(sums["z_loss"] / 7, (normalisers**2).mean(), rtol=RELATIVE)
