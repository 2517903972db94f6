"""Matryoshka M3: the projected patches, averaged over square windows (arXiv 2405.17430).

    patches_IPD --mean over k x k windows, k = floor(sqrt(P / tokens))--> tokens_IQD
                  a request takes those of its count (signature.py: Choice)

No parameters: its model is a LLaVA-1.5 that was trained with all of its numbers of tokens. Rows and
columns that fill no window are left out, as in the authors' code.

Dimensions: I images, P = side * side patches, Q tokens, D width of the language model.
"""

import dataclasses
import math

import jax.numpy as jnp

from llava_mini_jax.models.compressors.signature import (
    PROJECTED,
    Choice,
    Compressed,
    CompressorConfig,
    Declaration,
    check_counts,
    side_of,
)
from llava_mini_jax.models.compressors.windows import windows
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.params import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3Config(CompressorConfig):
    kind: str = "m3"
    count: int  # tokens of an image; 1, 9, 36, 144 or 576 in the release
    counts: tuple[int, ...] = ()  # those that a request may ask for; none: `count` alone

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"m3 has no {self.count} tokens; give 1 or more")
        check_counts("m3", self.counts, self.count, max((self.count, *self.counts)))

    @property
    def scales(self) -> tuple[int, ...]:
        """The counts whose tokens are computed."""
        return self.counts or (self.count,)


Config = M3Config


def declare(cfg: M3Config) -> Declaration:
    starts = [(n, sum(cfg.scales[:place])) for place, n in enumerate(cfg.scales)]
    choice = Choice(sum(cfg.scales), tuple(starts)) if cfg.counts else None
    return Declaration(places=(PROJECTED,), choice=choice)


def tokens(cfg: M3Config, side: int) -> int:
    for count in cfg.scales:
        if count > side * side or _made(count, side) != count:
            counts = sorted({_made(n, side) for n in range(1, side * side + 1)})
            raise ValueError(
                f"m3 has no {count} tokens of {side} x {side} patches; use one of "
                f"{', '.join(map(str, counts))}"
            )
    return cfg.count


def _made(count: int, side: int) -> int:
    """Tokens that the authors' rule makes where `count` are asked for."""
    return (side // math.isqrt(side * side // count)) ** 2


def spec(cfg: M3Config) -> None:
    return None


def apply(params: None, seen: Seen, cfg: M3Config) -> Compressed:
    side = side_of(seen)
    tokens(cfg, side)
    scales = [_pooled(seen.patches_IPE, side, count) for count in cfg.scales]
    return Compressed(jnp.concatenate(scales, axis=1))


def _pooled(patches_IPD: Array, side: int, count: int) -> Array:
    window = math.isqrt(side * side // count)
    whole = side // window * window
    I, _, D = patches_IPD.shape
    patches_IYXD = patches_IPD.reshape(I, side, side, D)[:, :whole, :whole]
    return windows(patches_IYXD.reshape(I, whole * whole, D), whole, window).mean(axis=2)
