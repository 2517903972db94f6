"""FastV: after a few layers most patches are dropped, by the attention they got (arXiv 2403.06764).

    layers[:K] --attention of the sequence's last token in layer K - 1--> scores of patches
                                                       the `keep` best stay --> layers[K:]

    "mask"   the others are keys that nobody sees from layer K on
    "drop"   they leave the sequence; those that stay keep their positions: the same numbers where
             something is left, with less work

Needs no training. The last token is the sequence's: without a cache the authors' code selects anew
for every token of an answer, and so do whole sequences here. With a cache it selects once, by the
prompt's last token, and keeps that ("drop", by `read`); so its later tokens may be others. Each row
has its own scores; in the authors' code a batch has those of its first row.

Dimensions: B rows, S positions, R positions that stay, P patches, N heads, D width of the LLM.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.models import llama
from llava_mini_jax.models.compressors.signature import (
    PROJECTED,
    Compressed,
    CompressorConfig,
    Declaration,
    How,
    Placed,
)
from llava_mini_jax.models.decoder import block, each
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.attention import attend, attention_weights
from llava_mini_jax.ops.layers import some_layers
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array, unstack

VARIANTS = ("mask", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastVConfig(CompressorConfig):
    kind: str = "fastv"
    layer: int  # K: patches are dropped in front of it; 2 in the paper
    keep: int  # patches of an image that stay: 288 of 576 are the paper's R = 50 %
    variant: str

    def __post_init__(self):
        if self.layer < 1:
            raise ValueError(f"fastv drops before layer {self.layer}; give 1 or more")
        if self.keep < 1:
            raise ValueError(f"fastv keeps {self.keep} patches; give 1 or more")
        if self.variant not in VARIANTS:
            raise ValueError(f'variant "{self.variant}" must be {" or ".join(VARIANTS)}')


Config = FastVConfig


def declare(cfg: FastVConfig) -> Declaration:
    drops = (cfg.layer, cfg.keep) if cfg.variant == "drop" else None
    return Declaration(
        places=(PROJECTED,),
        compresses=False,
        inside=True,
        behind=cfg.layer,
        drops=drops,
        keeps=drops,
    )


def tokens(cfg: FastVConfig, side: int) -> int:
    """Positions in front of the language model's first layer."""
    if cfg.keep > side * side:
        raise ValueError(f"fastv has no {cfg.keep} of {side * side} patches to keep")
    return side * side


def spec(cfg: FastVConfig) -> None:
    return None


def apply(params: None, seen: Seen, cfg: FastVConfig) -> Compressed:
    return Compressed(seen.patches_IPE)


def run(
    params: None, llm: llama.Llama, x_BSD: Array, placed: Placed, cfg: FastVConfig, how: How
) -> Array:
    """Hidden states [B, S, D]; in positions that were dropped nothing that means anything."""
    layers = each(llm.layers, how.llm)
    x_BSD, scores_BS = _first_layers(layers, x_BSD, placed, cfg, how)
    kept_BS = kept(scores_BS, placed, cfg)
    rest = some_layers(layers, cfg.layer, None)
    if cfg.variant == "mask":
        return _run(rest, x_BSD, kept_BS, how)
    # The same for all rows, and as many as a row with one image leaves. Stable, so that what
    # stays keeps its order, and what holds nothing goes first.
    R = x_BSD.shape[1] - (placed.patches - cfg.keep)
    places_BR = jnp.argsort(~kept_BS, axis=1, stable=True)[:, :R]
    places_BR = jnp.sort(places_BR, axis=1)
    short_BRD = jnp.take_along_axis(x_BSD, places_BR[..., None], axis=1)
    valid_BR = jnp.take_along_axis(kept_BS, places_BR, axis=1)
    short_BRD = _run(rest, short_BRD, valid_BR, how, positions_BS=places_BR)
    # A row without an image may have more than R positions: nobody shall take it for an answer.
    fits_B = kept_BS.sum(axis=1) <= R
    short_BRD = jnp.where(fits_B[:, None, None], short_BRD, jnp.nan)
    return jax.vmap(lambda x_SD, at_R, new_RD: x_SD.at[at_R].set(new_RD))(
        x_BSD, places_BR, short_BRD
    )


def read(
    llm: llama.Llama, x_BSD: Array, placed: Placed, stay: int, cfg: FastVConfig, how: How
) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """(hidden states [B, R, D], how many positions stayed [B], each layer's keys and values) of
    prompts; R, `stay`, is at least as many as stay.

    Those that stay come first, in their order, in the caches of layers from K on, too.
    """
    B, S, _ = x_BSD.shape
    layers = unstack(each(llm.layers, how.llm))
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    first, rest = layers[: cfg.layer], layers[cfg.layer :]
    observe = _observer(placed, how)
    x_BSD, found = _remembering(first, x_BSD, placed.valid_BS, positions_BS, how, observe)
    scores_BS = found[-1][1]
    kept_BS = kept(scores_BS, placed, cfg)
    places_BR = jnp.argsort(~kept_BS, axis=1, stable=True)[:, :stay]
    x_BRD = jnp.take_along_axis(x_BSD, places_BR[..., None], axis=1)
    valid_BR = jnp.take_along_axis(kept_BS, places_BR, axis=1)
    x_BRD, more = _remembering(rest, x_BRD, valid_BR, places_BR, how, observe=None)
    memories = [memory for memory, _ in found] + more
    return x_BRD, kept_BS.sum(axis=1, dtype=jnp.int32), memories


def _remembering(
    layers: Sequence[Any],
    x_BSD: Array,
    valid_BS: Array,
    positions_BS: Array,
    how: How,
    observe: Callable | None,
) -> tuple[Array, list[Any]]:
    attends = attend(Mask(first=0, valid_BS=valid_BS), how.attention)
    angles_BSH, memories = angles(positions_BS, how.llm.head_width, how.llm.rope), []
    for layer in layers:
        keep = lambda k, v: (k, v, (k, v))  # noqa: E731
        x_BSD, memory = block(layer, x_BSD, angles_BSH, attends, how.llm, keep, observe)
        memories.append(memory)
    return x_BSD, memories


def scores(llm: llama.Llama, x_BSD: Array, placed: Placed, cfg: FastVConfig, how: How) -> Array:
    """What a row's last token attends to in layer K - 1 [B, S], float32, mean over heads."""
    return _first_layers(each(llm.layers, how.llm), x_BSD, placed, cfg, how)[1]


def kept(scores_BS: Array, placed: Placed, cfg: FastVConfig) -> Array:
    """Which positions stay, bool [B, S]: what is no patch, and the best patches of each row."""
    # A choice has no gradient, and on a mesh JAX has none of the sort that makes it.
    scores_BS = jax.lax.stop_gradient(jnp.where(placed.visual_BS, scores_BS, -jnp.inf))
    # Of two alike the first one, as a stable sort has it.
    ranks_BS = jnp.argsort(jnp.argsort(-scores_BS, axis=1, stable=True), axis=1)
    pictures_B = (placed.visual_BS & (placed.place_BS == 0)).sum(axis=1)
    best_BS = ranks_BS < cfg.keep * pictures_B[:, None]
    return placed.valid_BS & (~placed.visual_BS | best_BS)


def _first_layers(
    layers: Any, x_BSD: Array, placed: Placed, cfg: FastVConfig, how: How
) -> tuple[Array, Array]:
    """(x behind layer K - 1, attention [B, S] of each row's last token there, mean over heads)."""
    if cfg.layer > 1:
        x_BSD = _run(some_layers(layers, 0, cfg.layer - 1), x_BSD, placed.valid_BS, how)
    (layer,) = unstack(some_layers(layers, cfg.layer - 1, cfg.layer))
    B, S, _ = x_BSD.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    mask = Mask(first=0, valid_BS=placed.valid_BS, window=how.llm.window)
    angles_BSH = angles(positions_BS, how.llm.head_width, how.llm.rope)
    attends, observe = attend(mask, how.attention), _observer(placed, how)
    x_BSD, (_, scores_BS) = block(layer, x_BSD, angles_BSH, attends, how.llm, observe=observe)
    return x_BSD, scores_BS


def _observer(placed: Placed, how: How) -> Callable[[Array, Array], Array]:
    """What of a layer's queries and keys says how much a row's last token attends to each position
    [B, S], mean over heads."""
    B, S = placed.valid_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    last_B = jnp.where(placed.valid_BS, positions_BS, 0).max(axis=1)
    mask = Mask(first=0, valid_BS=placed.valid_BS, window=how.llm.window)

    def observe(q_BSNH: Array, k_BKSH: Array) -> Array:
        dense_BSS = mask.dense(S, S)
        assert dense_BSS is not None
        own_B1SS = jnp.take_along_axis(dense_BSS, last_B[:, None, None], axis=1)
        q_B1NH = jnp.take_along_axis(q_BSNH, last_B[:, None, None, None], axis=1)
        # Their mean is over all heads, wherever these lie.
        q_B1NH, k_BKSH = (
            sharding.constrain(x, ("batch", None, None, None)) for x in (q_B1NH, k_BKSH)
        )
        # In full precision: which patches stay jumps where two scores swap.
        with jax.default_matmul_precision("highest"):
            weights_B1S = attention_weights(
                q_B1NH.astype(jnp.float32), k_BKSH.astype(jnp.float32), own_B1SS
            )
        return weights_B1S[:, 0]

    return observe


def _run(
    layers: Any, x_BSD: Array, valid_BS: Array, how: How, positions_BS: Array | None = None
) -> Array:
    if positions_BS is None:
        positions_BS = jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2])
    attends = attend(Mask(first=0, valid_BS=valid_BS, window=how.llm.window), how.attention)
    return llama.run_layers(layers, x_BSD, positions_BS, attends, how.llm, remat=how.remat)
