"""Who attends to whom in each layer of the language model (paper section 3, figures 2, 3 and 4).

    Examples --embed_inputs--> x_BSD --fold_layers: block, observe--> Summary of every layer
                                                                          |
                       sums over batches, on the host in float64 <--------'--> AttentionByLayer

A layer's attention [B, T, S] is summed up inside of the layer; what leaves it are 3 x 3 numbers a
layer and one small map. So 32 layers over 700 tokens need one layer's attention at a time.

Every token is of a kind: instruction (all text that the model is given), vision, or response (text
that it should say). Equations 4 and 5 (appendix A): attention a_ij is averaged over heads; from
kind A to kind B it is summed over all i in A and j in B, and divided by the number of tokens in A,
whose attention it is: so A's attention to all kinds sums to 1. (Which of the two kinds is divided
by is told by the results: "over 80 % of the attention" is not possible otherwise.)

The entropy of A's attention to B is that of each token's attention renormalised within B, averaged
over A; `evenness` is this entropy over log n, n being the B tokens that a token can see: 1 where it
attends to all alike, whatever their number. Tokens that see fewer than two of B do not count.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax.analysis.samples import padded_batch
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import Example, TrainBatch
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.recompute import refuse_own_layers
from llava_mini_jax.models import decoder, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops import masks
from llava_mini_jax.ops.attention import attention_weights, under
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array

KINDS = ("instruction", "vision", "response")
MAP_BINS = 96  # a map's side: longer sequences are drawn in bins of several tokens


@struct.dataclass
class Summary:
    """What a layer gives; J kinds of queries, K kinds of keys, all summed over rows and queries."""

    attention_JK: Array
    entropy_JK: Array  # nats
    evenness_JK: Array  # entropy / log n
    counted_JK: Array  # queries that see two or more keys of the kind
    map_GG: Array  # of the first row: mean over the queries of a bin, sum over its keys


@dataclasses.dataclass(frozen=True)
class AttentionByLayer:
    """Averages over a data set; NaN where there is no token of a kind."""

    attention_LJK: np.ndarray
    entropy_LJK: np.ndarray
    evenness_LJK: np.ndarray
    tokens_J: np.ndarray  # how many there were of each kind
    map_LGG: np.ndarray  # of the first example
    map_kinds_G: np.ndarray  # index into KINDS of each bin's first token
    examples: int


def summarise(weights_BTS: Array, kinds_BSK: Array, mask_BTS: Array, bins_SG: Array) -> Summary:
    """One layer's attention, averaged over heads, as a Summary.

    `kinds_BSK` is 1 where position s is of kind k, and 0 for all kinds at padding; `bins_SG` says
    which bin of the map a position of the first row is in.
    """

    def over_queries(x_BTK: Array) -> Array:
        return jnp.einsum("BTJ,BTK->JK", kinds_BSK, x_BTK)

    share_BTK = jnp.einsum("BTS,BSK->BTK", weights_BTS, kinds_BSK)
    seen_BTK = jnp.einsum("BTS,BSK->BTK", mask_BTS.astype(jnp.float32), kinds_BSK)
    counted_BTK = (seen_BTK > 1) & (share_BTK > 0)

    def entropy(kind: int) -> Array:
        own_BTS = weights_BTS * kinds_BSK[:, None, :, kind]
        # By 1 where a query does not count: what comes out is zeroed below, but must be finite.
        p_BTS = own_BTS / jnp.where(counted_BTK, share_BTK, 1)[..., kind, None]
        return -jax.scipy.special.xlogy(p_BTS, p_BTS).sum(axis=-1)

    entropy_BTK = jnp.stack([entropy(kind) for kind in range(len(KINDS))], axis=-1)
    entropy_BTK = jnp.where(counted_BTK, entropy_BTK, 0)
    # Two at least: log 1 is 0, and 0 / 0 would spoil the sum of all queries.
    most_BTK = jnp.log(jnp.maximum(seen_BTK, 2))
    size_G = jnp.maximum(bins_SG.sum(axis=0), 1)
    return Summary(
        attention_JK=over_queries(share_BTK),
        entropy_JK=over_queries(entropy_BTK),
        evenness_JK=over_queries(entropy_BTK / most_BTK),
        counted_JK=over_queries(counted_BTK.astype(jnp.float32)),
        map_GG=(bins_SG.T @ weights_BTS[0] @ bins_SG) / size_G[:, None],
    )


@partial(jax.jit, static_argnames="cfg")
def observe(params: LlavaMini, batch: TrainBatch, bins_SG: Array, cfg: LlavaMiniConfig) -> Summary:
    """Summaries of all layers, with a leading layer axis, of the language model over a batch."""
    x_BSD = llava_mini.embed_inputs(params, batch.inputs, cfg)
    slots_BS = batch.inputs.slots_BS
    valid_BS = slots_BS >= 0
    kinds_BSK = jax.nn.one_hot(kinds(batch), len(KINDS))  # zeros at padding, which is -1
    mask_BTS = masks.causal(valid_BS, cfg.llm.window)
    angles_BSH = angles(masks.running_positions(valid_BS), cfg.llm.head_width, cfg.llm.rope)

    def look(q_BTNH: Array, k_BKSH: Array) -> Summary:
        weights_BTS = attention_weights(q_BTNH, k_BKSH, mask_BTS)
        return summarise(weights_BTS, kinds_BSK, mask_BTS, bins_SG)

    def body(layer: decoder.Layer, x_BSD: Array, _: None) -> tuple[Array, Summary]:
        x_BSD, (_, summary) = decoder.block(
            layer, x_BSD, angles_BSH, under(mask_BTS), cfg.llm, observe=look
        )
        return x_BSD, summary

    return fold_layers(body, decoder.each(params.llm.layers, cfg.llm), x_BSD)[1]


def kinds(batch: TrainBatch) -> Array:
    """Index into KINDS of every position [B, S], -1 at padding."""
    slots_BS, text = batch.inputs.slots_BS, batch.inputs.ids_BT.shape[1]
    said = jnp.where(batch.labels_BS != IGNORE, KINDS.index("response"), 0)
    of_text = jnp.where(slots_BS >= text, KINDS.index("vision"), said)
    return jnp.where(slots_BS >= 0, of_text, -1)


def by_layer(
    params: LlavaMini, bundle: Bundle, examples: Iterable[Example], *, batch_size: int
) -> AttentionByLayer:
    """Averages over examples with answers, which are read a batch at a time.

    Raises InputError for a model that compresses inside its layers, or an image into tokens of
    another number than the next, and where there is no example.
    """
    cfg = bundle.model
    refuse_own_layers(cfg)
    if cfg.declared.adaptive:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" gives images different numbers of tokens, which'
            " averages over tokens cannot represent; give it a fixed ratio"
        )
    totals, tokens, first, count = None, np.zeros(len(KINDS)), None, 0
    for batch, real in _batches(examples, bundle, batch_size):
        kinds_BS = np.asarray(kinds(batch))
        found = observe(params, batch, _bins(kinds_BS[0]), cfg)
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        if totals is None:
            totals, first = found, kinds_BS[0]
        else:
            shown = totals.map_GG
            totals = jax.tree.map(np.add, totals, found)
            totals = dataclasses.replace(totals, map_GG=shown)
        tokens += [(kinds_BS == kind).sum() for kind in range(len(KINDS))]
        count += real
    if totals is None or first is None:
        raise InputError("no example with an image can be read; see the reasons above")
    return _averages(totals, tokens, first, count)


def _averages(
    totals: Summary, tokens_J: np.ndarray, first_S: np.ndarray, examples: int
) -> AttentionByLayer:
    size = _used(first_S)
    with np.errstate(invalid="ignore", divide="ignore"):
        return AttentionByLayer(
            attention_LJK=np.asarray(totals.attention_JK) / tokens_J[:, None],
            entropy_LJK=np.asarray(totals.entropy_JK) / np.asarray(totals.counted_JK),
            evenness_LJK=np.asarray(totals.evenness_JK) / np.asarray(totals.counted_JK),
            tokens_J=tokens_J,
            map_LGG=np.asarray(totals.map_GG)[:, :size, :size],
            map_kinds_G=_kinds_of_bins(first_S),
            examples=examples,
        )


def _batches(
    examples: Iterable[Example], bundle: Bundle, batch_size: int
) -> Iterable[tuple[TrainBatch, int]]:
    """(batch, its number of examples); the last one is filled with rows that are all padding."""
    buckets, pending = bounds.buckets_for(bundle), []
    for example in examples:
        pending.append(example)
        if len(pending) == batch_size:
            yield padded_batch(pending, bundle, buckets, batch_size), len(pending)
            pending = []
    if pending:
        yield padded_batch(pending, bundle, buckets, batch_size), len(pending)


def _bins(kinds_S: np.ndarray) -> np.ndarray:
    """[S, MAP_BINS] float32: the bin of each real position; zeros at padding."""
    real = np.flatnonzero(kinds_S >= 0)
    bins = np.zeros((len(kinds_S), MAP_BINS), np.float32)
    bins[real, _bin_of(len(real))] = 1
    return bins


def _bin_of(count: int) -> np.ndarray:
    """A bin for each of `count` positions: its own, or a share of MAP_BINS."""
    return np.arange(count) * min(MAP_BINS, count) // max(count, 1)


def _used(kinds_S: np.ndarray) -> int:
    return min(MAP_BINS, int((kinds_S >= 0).sum()))


def _kinds_of_bins(kinds_S: np.ndarray) -> np.ndarray:
    real = kinds_S[kinds_S >= 0]
    _, first = np.unique(_bin_of(len(real)), return_index=True)
    return real[first]


def as_json(found: AttentionByLayer) -> dict[str, Any]:
    """Everything but the map, with names; NaN as None."""

    def named(values_LJK: np.ndarray) -> dict[str, list[float | None]]:
        return {
            f"{a} to {b}": [None if np.isnan(v) else float(v) for v in values_LJK[:, j, k]]
            for j, a in enumerate(KINDS)
            for k, b in enumerate(KINDS)
        }

    return {
        "examples": found.examples,
        "tokens": dict(zip(KINDS, map(int, found.tokens_J), strict=True)),
        "attention": named(found.attention_LJK),
        "entropy, nats": named(found.entropy_LJK),
        "entropy / log n": named(found.evenness_LJK),
    }
