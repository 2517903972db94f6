"""Matryoshka M3: the projected patches, averaged over square windows (arXiv 2405.17430).

    patches_IPD --mean over k x k windows, k = floor(sqrt(P / tokens))--> tokens_IQD

No parameters: its model is a LLaVA-1.5 that was trained with all of its numbers of tokens. Rows and
columns that fill no window are left out, as in the authors' code.

Dimensions: I images, P = side * side patches, Q tokens, D width of the language model.
"""

import dataclasses
import math

from llava_mini_jax.models.compressors.signature import (
    PROJECTED,
    Compressed,
    CompressorConfig,
    Declaration,
    side_of,
)
from llava_mini_jax.models.compressors.windows import windows
from llava_mini_jax.models.seen import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3Config(CompressorConfig):
    kind: str = "m3"
    count: int  # tokens of an image; 1, 9, 36, 144 or 576 in the release

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"m3 has no {self.count} tokens; give 1 or more")


Config = M3Config


def declare(cfg: M3Config) -> Declaration:
    return Declaration(places=(PROJECTED,))


def tokens(cfg: M3Config, side: int) -> int:
    if cfg.count > side * side or _made(cfg.count, side) != cfg.count:
        counts = sorted({_made(n, side) for n in range(1, side * side + 1)})
        raise ValueError(
            f"m3 has no {cfg.count} tokens of {side} x {side} patches; use one of "
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
    window = math.isqrt(side * side // tokens(cfg, side))
    whole = side // window * window
    I, _, D = seen.patches_IPE.shape
    patches_IYXD = seen.patches_IPE.reshape(I, side, side, D)[:, :whole, :whole]
    patches_IPD = patches_IYXD.reshape(I, whole * whole, D)
    return Compressed(windows(patches_IPD, whole, window).mean(axis=2))
