"""VisionZip: what the class token looks at, and the rest averaged into a few (2412.04467).

    class token's attention in the layer that makes the features, summed over heads
      --highest--> dominant: the class token and `dominant` - 1 patches, in the image's order
    the rest --every step-th--> targets; others --to the target with the most similar key-->
      contextual: target + mean of those that came to it

Nothing is learnt; keys are averaged over heads.

Dimensions: I images, P patches, S = P + 1 with the class token first, M of them not dominant, C
targets, E width, H head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZipConfig(CompressorConfig):
    kind: str = "visionzip"
    layer: int  # of the tower, whose attention and keys choose: the one that makes the features
    dominant: int  # the class token among them; 54 in the README
    contextual: int  # 10 there

    def __post_init__(self):
        if self.dominant < 1 or self.contextual < 1:
            raise ValueError(
                f"visionzip has no {self.dominant} dominant and {self.contextual} contextual"
                " tokens; give 1 or more of each"
            )


Config = VisionZipConfig


def declare(cfg: VisionZipConfig) -> Declaration:
    return Declaration(places=(FEATURES,), reads=Reads(heads_of=cfg.layer, class_token=True))


def tokens(cfg: VisionZipConfig, side: int) -> int:
    count, positions = cfg.dominant + cfg.contextual, side * side + 1
    if count > positions:
        raise ValueError(
            f"visionzip has no {cfg.dominant} + {cfg.contextual} tokens of {side} x {side} patches"
            f" and a class token; give {positions} together at most"
        )
    return count


def spec(cfg: VisionZipConfig) -> None:
    return None


@struct.dataclass
class Chosen:
    score_IP: Array  # attention of the class token, summed over heads
    metric_ISH: Array  # keys, averaged over heads
    rank_IP: Array  # of the scores, falling
    order_IS: Array  # dominant positions, rising, then the others, rising


def apply(params: None, seen: Seen, cfg: VisionZipConfig) -> Compressed:
    tokens(cfg, math.isqrt(seen.patches_IPE.shape[1]))

    def of_rows(*read: Array) -> Array:
        patches_IPE, class_IE, query_INH, keys_ISNH = read
        some = Seen(patches_IPE, class_IE=class_IE, query_INH=query_INH, keys_ISNH=keys_ISNH)
        return zipped(some, choose(some, cfg), cfg)

    read = (seen.patches_IPE, seen.class_IE, seen.query_INH, seen.keys_ISNH)
    return Compressed(sharding.by_rows(of_rows, *read))


def zipped(seen: Seen, chosen: Chosen, cfg: VisionZipConfig) -> Array:
    """The tokens [I, Q, E]: dominant ones, then contextual ones."""
    features_ISE = jnp.concatenate([seen.class_IE[:, None], seen.patches_IPE], axis=1)
    features_ISE = take(features_ISE.astype(jnp.float32), chosen.order_IS)
    others_IME = features_ISE[:, cfg.dominant :]
    keys_IMH = unit(take(chosen.metric_ISH, chosen.order_IS)[:, cfg.dominant :])
    contextual_ICE = gathered(others_IME, keys_IMH, cfg.contextual)
    tokens_IQE = jnp.concatenate([features_ISE[:, : cfg.dominant], contextual_ICE], axis=1)
    return tokens_IQE.astype(seen.patches_IPE.dtype)


def choose(seen: Seen, cfg: VisionZipConfig) -> Chosen:
    H = seen.keys_ISNH.shape[-1]
    attention_INP = class_attention(seen.query_INH, seen.keys_ISNH, scale=H**-0.5)
    score_IP = attention_INP.sum(axis=1)
    rank_IP = ranks(score_IP)
    is_other_IS = jnp.pad(rank_IP >= cfg.dominant - 1, ((0, 0), (1, 0)))
    order_IS = jnp.argsort(is_other_IS, axis=1, stable=True)
    return Chosen(score_IP, seen.keys_ISNH.mean(axis=2), rank_IP, order_IS)


def gathered(others_IME: Array, keys_IMH: Array, count: int) -> Array:
    """Targets [I, C, E] at equal distances, with the mean of what is most similar to each."""
    M = others_IME.shape[1]
    at_C = jnp.arange(count) * max(1, M // count)
    likeness_IMC = full("IMH,ICH->IMC", keys_IMH, keys_IMH[:, at_C])
    comes_IMC = jax.nn.one_hot(jnp.argmax(likeness_IMC, axis=2), count, dtype=jnp.float32)
    # A target stays where it is.
    comes_IMC = comes_IMC * ~jnp.isin(jnp.arange(M), at_C)[:, None]
    sum_ICE = full("IMC,IME->ICE", comes_IMC, others_IME)
    return others_IME[:, at_C] + sum_ICE / jnp.maximum(comes_IMC.sum(axis=1), 1)[..., None]
