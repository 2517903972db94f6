"""The loss against the same arithmetic in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.data.conversation import IGNORE
from llava_mini_jax.training.loss import loss, next_token_loss
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
