"""Next-token cross-entropy over supervised positions, in float32."""

import jax
import jax.numpy as jnp

from llava_mini_jax.data.conversation import IGNORE
from llava_mini_jax.data.examples import TrainBatch
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array


def loss(
    params: LlavaMini, batch: TrainBatch, cfg: LlavaMiniConfig
) -> tuple[Array, dict[str, Array]]:
    """(mean loss over all supervised tokens of the batch, sums for the metrics)."""
    x_BSD = llava_mini.apply(params, batch.inputs, cfg)
    logits_BSV = llama.logits(params.llm, x_BSD[:, :-1])
    return next_token_loss(logits_BSV, batch.labels_BS[:, 1:])


def next_token_loss(logits_BSV: Array, targets_BS: Array) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of logits against the tokens to be predicted there (IGNORE: not counted)."""
    counted_BS = targets_BS != IGNORE
    safe_BS = jnp.where(counted_BS, targets_BS, 0)
    normaliser_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    is_target_BSV = jnp.arange(logits_BSV.shape[-1]) == safe_BS[..., None]
    # A masked sum instead of a gather: each device sums its own piece of the vocabulary.
    target_BS = jnp.where(is_target_BSV, logits_BSV, 0.0).sum(-1)
    total = jnp.where(counted_BS, normaliser_BS - target_BS, 0.0).sum()
    tokens = counted_BS.sum()
    right = jnp.where(counted_BS, logits_BSV.argmax(-1) == safe_BS, False).sum()
    return total / jnp.maximum(tokens, 1), {"tokens": tokens, "right_tokens": right}
