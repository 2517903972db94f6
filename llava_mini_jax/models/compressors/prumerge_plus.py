"""LLaVA-PruMerge+: PruMerge with patches at regular distances kept too (2403.15388).

    outliers, by falling a --.
    every step-th patch -----+--> kept --merge (prumerge.py)--> tokens, and one of the others

`ratio` 0 takes step = floor(floor(P / outliers) / 3) from patch 0 on; a fixed ratio r takes
step = floor(1 / r) from step / 2 on ("this is for training" in the authors' code).

`variant` "release": no patch at regular distances is the last one (the code stops at 575 of 576);
with a fixed ratio a patch may be kept twice, and as many others, the first ones, are lost to all
tokens. It fails for batches where the number is adaptive: one image a call here, too. "clean":
each image has its own ratio, the last patch is reached, and each patch is kept once. Without an
outlier, where the release divides by zero, the extra token is the only one.

Dimensions: I images, P patches, L listed ones, K kept at most.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.models.compressors import prumerge
from llava_mini_jax.models.compressors.prumerge import Chosen, PruMergeConfig
from llava_mini_jax.models.compressors.selection import ranks
from llava_mini_jax.models.compressors.signature import Compressed, Declaration
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.params import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergePlusConfig(PruMergeConfig):
    kind: str = "prumerge_plus"


Config = PruMergePlusConfig


def declare(cfg: PruMergePlusConfig) -> Declaration:
    declared = prumerge.declare(cfg)
    # Without doubles a fixed ratio keeps different numbers, too.
    return dataclasses.replace(declared, adaptive=declared.adaptive or cfg.variant == "clean")


def tokens(cfg: PruMergePlusConfig, side: int) -> int:
    prumerge.tokens(cfg, side)
    return _most_kept(cfg, side * side) + 1


def _most_kept(cfg: PruMergePlusConfig, patches: int) -> int:
    most = prumerge.most_kept(cfg, patches)
    if cfg.ratio:
        return most + len(_regular(cfg, patches))
    stop = _stop(cfg, patches)
    counts = [n + len(range(0, stop, step)) for n, step in enumerate(_steps(patches)) if n]
    return min(patches, max(counts))


def _stop(cfg: PruMergePlusConfig, patches: int) -> int:
    return patches - 1 if cfg.variant == "release" else patches


def _regular(cfg: PruMergePlusConfig, patches: int) -> range:
    """The patches at regular distances of a fixed ratio."""
    step = int(1 / cfg.ratio)
    return range(step // 2, _stop(cfg, patches), step)


def _steps(patches: int) -> list[int]:
    """The distance by the number of outliers, as Python's floats round it; of none, past all."""
    return [patches, *(max(1, int(int(1 / (n / patches)) / 3)) for n in range(1, patches // 4 + 1))]


def spec(cfg: PruMergePlusConfig) -> None:
    return None


def apply(params: None, seen: Seen, cfg: PruMergePlusConfig) -> Compressed:
    tokens(cfg, math.isqrt(seen.patches_IPE.shape[1]))
    chooses, adaptive = functools.partial(choose, cfg=cfg), declare(cfg).adaptive
    return prumerge.kept_and_merged(seen, chooses, cfg, adaptive=adaptive)


def choose(attention_IP: Array, cfg: PruMergePlusConfig) -> Chosen:
    if cfg.ratio and cfg.variant == "release":
        return _with_doubles(attention_IP, cfg)
    P = attention_IP.shape[1]
    count_I1 = prumerge.how_many(attention_IP, cfg)[:, None]
    if cfg.ratio:
        is_regular_IP = jnp.zeros(P, bool).at[np.asarray(_regular(cfg, P))].set(True)[None]
    else:
        step_I1 = jnp.asarray(_steps(P))[count_I1]
        place_P = jnp.arange(P)
        is_regular_IP = (place_P % step_I1 == 0) & (place_P < _stop(cfg, P)) & (count_I1 > 0)
    rank_IP = ranks(attention_IP)
    is_outlier_IP = rank_IP < count_I1
    others_IP = jnp.where(is_regular_IP, P, 2 * P) + jnp.arange(P)
    order_IP = jnp.argsort(jnp.where(is_outlier_IP, rank_IP, others_IP), axis=1, stable=True)
    kept_I = (is_outlier_IP | is_regular_IP).sum(axis=1, dtype=jnp.int32)
    return Chosen(order_IP, kept_I, _most_kept(cfg, P))


def _with_doubles(attention_IP: Array, cfg: PruMergePlusConfig) -> Chosen:
    """The release's: the highest a and the regular patches end to end, whatever is in both."""
    (I, P), K = attention_IP.shape, _most_kept(cfg, attention_IP.shape[1])
    regular_P = np.asarray(_regular(cfg, P))
    rank_IP = ranks(attention_IP)
    highest_IK = jnp.argsort(rank_IP, axis=1)[:, : K - len(regular_P)]
    is_kept_IP = (rank_IP < K - len(regular_P)).at[:, regular_P].set(True)
    # As many entries as patches less kept ones, which is fewer than there are others by the
    # doubles: the first others fall off.
    others_IP = jnp.argsort(jnp.where(is_kept_IP, -1, jnp.arange(P)), axis=1, stable=True)[:, K:]
    regular_IK = jnp.broadcast_to(jnp.asarray(regular_P), (I, len(regular_P)))
    listed_IL = jnp.concatenate([highest_IK, regular_IK, others_IP], axis=1)
    return Chosen(listed_IL, jnp.full(I, K, jnp.int32), K)
