"""Next-token cross-entropy over supervised positions, in float32.

    x_BSD --head, a chunk of positions at a time--> logits_BCV --> sums over tokens --> objective

Everything is a sum over supervised tokens until it is divided once by how many there are: sums of
chunks, of micro-batches and of devices add up to those of the whole batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llama import Llama
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array

Sums = dict[str, Array]  # scalars, of `logit_sums`


class ByCount(NamedTuple):
    """Which rows belong together: those whose images have as many tokens."""

    tokens_B: Array
    counts: tuple[int, ...]


def loss(
    params: LlavaMini,
    batch: TrainBatch,
    cfg: LlavaMiniConfig,
    *,
    chunk: int = 0,
    z_loss: float = 0.0,
    tokens: Array | None = None,
) -> tuple[Array, Sums]:
    """(objective, sums): cross-entropy in nats, and `z_loss` times the z-loss, per token.

    `tokens` is how many supervised tokens to divide by, the batch's own without it: micro-batches
    of one step divide by the whole step's, and their objectives add up to the step's.
    """
    x_BSD = llava_mini.apply(params, batch.inputs, cfg)
    # Position s predicts the token at s + 1.
    by = None if batch.tokens_B is None else ByCount(batch.tokens_B, counts_of(cfg))
    sums = hidden_sums(params.llm, x_BSD[:, :-1], batch.labels_BS[:, 1:], chunk, by)
    if by is not None:
        sums |= {f"rows_at_{n}": (by.tokens_B == n).sum() for n in by.counts}
    total = sums["cross_entropy"]
    if z_loss:
        total += z_loss * sums["z_loss"]
    return mean(total, sums["tokens"] if tokens is None else tokens), sums


def counts_of(cfg: LlavaMiniConfig) -> tuple[int, ...]:
    """The numbers of vision tokens whose rows' losses are told apart."""
    choice = cfg.declared.choice
    return () if choice is None else choice.counts


def supervised_tokens(batch: TrainBatch) -> Array:
    """How many tokens of a batch are predicted: the first position's is not."""
    return (batch.labels_BS[:, 1:] != IGNORE).sum()


def mean(total: Array, tokens: Array) -> Array:
    """A sum over supervised tokens as their mean; 0 where there is none."""
    return total / jnp.maximum(tokens, 1)


def hidden_sums(
    llm: Llama, x_BSD: Array, targets_BS: Array, chunk: int, by: ByCount | None = None
) -> Sums:
    """`logit_sums` of hidden states, with the logits of `chunk` positions at a time (0: of all).

    The backward pass computes a chunk's logits again, so that neither pass ever holds more than
    [B, chunk, V] of them: for 400 positions of LLaMA-3.1 all are 205 MB a row in float32, several
    times over.
    """
    if not chunk or chunk >= x_BSD.shape[1]:
        return logit_sums(llama.logits(llm, x_BSD), targets_BS, by)

    def chunk_sums(chunk_of: tuple[Array, Array]) -> Sums:
        x_BCD, targets_BC = chunk_of
        return logit_sums(llama.logits(llm, x_BCD), targets_BC, by)

    # Gathered once, not for every chunk, forwards and backwards.
    llm = _with_whole_head(llm, x_BSD)
    # Chunks are cut along positions: rows stay on the devices that have them.
    missing = -x_BSD.shape[1] % chunk
    x_BSD = jnp.pad(x_BSD, ((0, 0), (0, missing), (0, 0)))
    targets_BS = jnp.pad(targets_BS, ((0, 0), (0, missing)), constant_values=IGNORE)
    chunks = _cut(x_BSD, chunk), _cut(targets_BS, chunk)
    # Inside a loop nothing can undo the recomputation, so its costly prevention is not needed.
    sums = jax.lax.map(jax.checkpoint(chunk_sums, prevent_cse=False), chunks)
    return jax.tree.map(lambda each: each.sum(0), sums)


def _with_whole_head(llm: Llama, x_BSD: Array) -> Llama:
    name = "embed_tokens" if llm.lm_head is None else "lm_head"
    return dataclasses.replace(llm, **{name: sharding.gather(getattr(llm, name), x_BSD)})


def _cut(array: Array, chunk: int) -> Array:
    """[B, S, ...] as chunks of positions [S / chunk, B, chunk, ...]."""
    B, S, *rest = array.shape
    return jnp.moveaxis(array.reshape(B, S // chunk, chunk, *rest), 1, 0)


def logit_sums(logits_BSV: Array, targets_BS: Array, by: ByCount | None = None) -> Sums:
    """Sums over supervised tokens, of logits and the tokens to be predicted there (IGNORE: none).

    cross_entropy   in nats
    z_loss          log(sum(exp(logits)))^2: its mean keeps logits from drifting (PaLM, section 5)
    tokens          1
    right_tokens    1 where the largest logit is the token's

    And with `by`, of the rows of each count n alone, cross_entropy_at_n and tokens_at_n.
    """
    counted_BS = targets_BS != IGNORE
    normaliser_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    is_target_BSV = jnp.arange(logits_BSV.shape[-1]) == targets_BS[..., None]
    # A masked sum instead of a gather: each device sums its own piece of the vocabulary, and
    # IGNORE, which is no token, needs no care.
    target_BS = jnp.where(is_target_BSV, logits_BSV, 0.0).sum(-1)
    is_right_BS = logits_BSV.argmax(-1) == targets_BS
    losses_BS = jnp.where(counted_BS, normaliser_BS - target_BS, 0.0)
    apart: Sums = {}
    tokens_B, counts = by or (None, ())
    for n in counts:
        rows_B1 = (tokens_B == n)[:, None]
        apart[f"cross_entropy_at_{n}"] = jnp.where(rows_B1, losses_BS, 0.0).sum()
        apart[f"tokens_at_{n}"] = (rows_B1 & counted_BS).sum()
    return apart | {
        "cross_entropy": losses_BS.sum(),
        "z_loss": jnp.where(counted_BS, normaliser_BS**2, 0.0).sum(),
        "tokens": counted_BS.sum(),
        "right_tokens": is_right_BS.sum(),
    }


def next_token_loss(logits_BSV: Array, targets_BS: Array) -> tuple[Array, Sums]:
    """(mean cross-entropy, sums) of logits against the tokens to be predicted there."""
    sums = logit_sums(logits_BSV, targets_BS)
    return mean(sums["cross_entropy"], sums["tokens"]), sums
