"""No compression: every patch is a token, as in LLaVA-1.5.

patches_IPE --> tokens_IPE
"""

from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.signature import (
    FEATURES,
    PROJECTED,
    Compressed,
    Declaration,
)
from llava_mini_jax.models.seen import Seen

Config = GridConfig


def declare(cfg: GridConfig) -> Declaration:
    return Declaration(places=(PROJECTED, FEATURES), parts=True, videos=True, compresses=False)


def tokens(cfg: GridConfig, side: int) -> int:
    return side * side


def spec(cfg: GridConfig) -> None:
    return None


def apply(params: None, seen: Seen, cfg: GridConfig) -> Compressed:
    return Compressed(seen.patches_IPE)
