"""LLaVA-PruMerge: patches that the class token looks at, each with its like added (2403.15388).

    class token's query, keys of the last layer --> a_IP --outliers--> kept, by falling a
    x_i + sum of a_j x_j over the 32 patches with the most similar keys ----> a token of each
    sum of a_j x_j over those that were not kept ---------------------------> one token more

Nothing is learnt. `ratio` 0 keeps as many patches as have an a above Q3 + 1.5 (Q3 - Q1), which are
a quarter at most; tokens behind those that are there are not valid.

`variant` "release" shares the ratio among the images of a call, as the authors' code does; in
"clean" each image has its own. Sums are not divided by the a, in both (the paper: an average).
Without an outlier the extra token is the only one.

Dimensions: I images, P patches, S = P + 1 with the class token, K kept at most, E width, N heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from llava_mini_jax import sharding
from llava_mini_jax.models.compressors.selection import class_attention, full, ranks, take, unit
from llava_mini_jax.models.compressors.signature import (
    FEATURES,
    Compressed,
    CompressorConfig,
    Declaration,
)
from llava_mini_jax.models.seen import Reads, Seen
from llava_mini_jax.params import Array

VARIANTS = ("release", "clean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergeConfig(CompressorConfig):
    kind: str = "prumerge"
    layer: int  # of the tower, whose queries and keys choose: the one behind the features
    neighbours: int  # patches that are added to a kept one: 32 in the release
    ratio: float  # of the patches that are kept, such as 1/8; 0: as many as are outliers
    variant: str  # "release" or "clean"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f'{self.kind}: variant "{self.variant}" is unknown; use {" or ".join(VARIANTS)}'
            )
        if not 0 <= self.ratio < 1 or self.neighbours < 1:
            raise ValueError(
                f"{self.kind}: ratio {self.ratio} and {self.neighbours} neighbours; give a ratio"
                " from 0 (outliers) to below 1, and at least one neighbour"
            )


Config = PruMergeConfig


def declare(cfg: PruMergeConfig) -> Declaration:
    adaptive = cfg.ratio == 0
    return Declaration(
        places=(FEATURES,),
        reads=Reads(heads_of=cfg.layer),
        adaptive=adaptive,
        pooled=adaptive and cfg.variant == "release",
    )


def tokens(cfg: PruMergeConfig, side: int) -> int:
    patches = side * side
    if cfg.neighbours >= patches:
        raise ValueError(
            f"{cfg.kind}: {patches} patches have no {cfg.neighbours} neighbours each; give more"
            " patches"
        )
    return most_kept(cfg, patches) + 1


def most_kept(cfg: PruMergeConfig, patches: int) -> int:
    if cfg.ratio == 0:
        return patches // 4  # above the third quartile
    kept = int(patches * cfg.ratio)
    if not kept:
        raise ValueError(f"{cfg.kind}: ratio {cfg.ratio} of {patches} patches keeps none")
    return kept


def spec(cfg: PruMergeConfig) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is kept, in a form that allows patches to be listed twice, or not at all (release)."""

    listed_IL: Array  # patches: the kept ones in order, then the others, rising
    kept_I: Array  # how many of them are kept
    count: int  # K: at most


def apply(params: None, seen: Seen, cfg: PruMergeConfig) -> Compressed:
    side = math.isqrt(seen.patches_IPE.shape[1])
    tokens(cfg, side)
    chooses, adaptive = functools.partial(choose, cfg=cfg), declare(cfg).adaptive
    return kept_and_merged(seen, chooses, cfg, adaptive=adaptive)


def kept_and_merged(
    seen: Seen, chooses: Callable[[Array], Chosen], cfg: PruMergeConfig, *, adaptive: bool
) -> Compressed:
    """What both methods do with the patches that each chooses by the class token's attention."""

    def of_rows(patches_IPE: Array, query_INH: Array, keys_ISNH: Array) -> Compressed:
        some = Seen(patches_IPE, query_INH=query_INH, keys_ISNH=keys_ISNH)
        attention_IP, keys_IPE = scores(some)
        return merge(patches_IPE, keys_IPE, attention_IP, chooses(attention_IP), cfg.neighbours)

    merged = sharding.by_rows(of_rows, seen.patches_IPE, seen.query_INH, seen.keys_ISNH)
    return merged if adaptive else dataclasses.replace(merged, valid_IQ=None)


def scores(seen: Seen) -> tuple[Array, Array]:
    """(the class token's attention [I, P], the patches' keys [I, P, E]), in float32."""
    I, S, N, H = seen.keys_ISNH.shape
    # The heads are one: a single softmax over all of the width, with that width's scale.
    query_I1E = seen.query_INH.reshape(I, 1, N * H)
    keys_ISE = seen.keys_ISNH.reshape(I, S, N * H)
    attention_I1P = class_attention(query_I1E, keys_ISE[:, :, None], scale=(N * H) ** -0.5)
    return attention_I1P[:, 0], keys_ISE[:, 1:]


def choose(attention_IP: Array, cfg: PruMergeConfig) -> Chosen:
    P, K = attention_IP.shape[1], most_kept(cfg, attention_IP.shape[1])
    rank_IP, kept_I = ranks(attention_IP), how_many(attention_IP, cfg)
    key_IP = jnp.where(rank_IP < kept_I[:, None], rank_IP, P + jnp.arange(P))
    return Chosen(jnp.argsort(key_IP, axis=1, stable=True), kept_I, K)


def how_many(attention_IP: Array, cfg: PruMergeConfig) -> Array:
    """How many patches of each image are kept, int32 [I]."""
    I, P = attention_IP.shape
    if cfg.ratio:
        return jnp.full(I, most_kept(cfg, P), jnp.int32)
    if cfg.variant == "clean":
        return outliers(attention_IP)
    # As the release rounds it, in Python's floats: of 49 patches and one outlier it keeps none.
    kept = np.array([int(P * (count / (I * P))) for count in range(I * P + 1)], np.int32)
    shared = outliers(attention_IP.reshape(1, I * P))
    return jnp.broadcast_to(jnp.asarray(kept)[shared], (I,))


def outliers(attention_IP: Array) -> Array:
    """How many numbers of each row lie above Q3 + 1.5 (Q3 - Q1)."""
    sorted_IP = jnp.sort(attention_IP, axis=1)
    first, third = (_percentile(sorted_IP, share) for share in (0.25, 0.75))
    bound_I = third + 1.5 * (third - first)
    return (attention_IP > bound_I[:, None]).sum(axis=1, dtype=jnp.int32)


def _percentile(sorted_IP: Array, share: float) -> Array:
    """numpy's, linear between two numbers: of equal ones exactly that number."""
    place = share * (sorted_IP.shape[1] - 1)
    below = math.floor(place)
    low_I, high_I = sorted_IP[:, below], sorted_IP[:, math.ceil(place)]
    return low_I + (high_I - low_I) * (place - below)


def merge(
    patches_IPE: Array, keys_IPE: Array, attention_IP: Array, chosen: Chosen, neighbours: int
) -> Compressed:
    """Kept patches with their neighbours, then the token of those that were not kept."""
    K = chosen.count
    slot_L = jnp.arange(chosen.listed_IL.shape[1])
    kept_I1 = chosen.kept_I[:, None]
    keys_ILE = take(unit(keys_IPE), chosen.listed_IL)
    likeness_IKL = full("IKE,ILE->IKL", keys_ILE[:, :K], keys_ILE)
    # Not its own neighbour; one that is listed twice is its twin's, though.
    itself_KL = jnp.eye(K, slot_L.size, dtype=bool)
    near_IKL = ranks(jnp.where(itself_KL, -jnp.inf, likeness_IKL)) < neighbours

    given_IL = jnp.take_along_axis(attention_IP, chosen.listed_IL, axis=1)
    others_I1L = jnp.where(slot_L >= kept_I1, given_IL, 0)[:, None]
    weights_IKL = itself_KL + near_IKL * given_IL[:, None]
    weights_IQL = jnp.concatenate([weights_IKL, others_I1L], axis=1)
    # The extra token stands behind the last that is kept.
    order_Q = jnp.arange(K + 1)
    source_IQ = jnp.where(order_Q == kept_I1, K, jnp.minimum(order_Q, K))
    weights_IQL = take(weights_IQL, source_IQ)
    valid_IQ = order_Q <= kept_I1
    features_ILE = take(patches_IPE, chosen.listed_IL)
    tokens_IQE = full("IQL,ILE->IQE", weights_IQL, features_ILE).astype(patches_IPE.dtype)
    return Compressed(jnp.where(valid_IQ[..., None], tokens_IQE, 0), valid_IQ=valid_IQ)
