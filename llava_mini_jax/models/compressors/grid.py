"""What the compressors to C*C tokens share: config, declaration, number of tokens.

patches of a square map, [I, P, E] --> tokens of a square grid, [I, C*C, E]
"""

import dataclasses

from llava_mini_jax.models.compressors.signature import (
    FEATURES,
    PROJECTED,
    CompressorConfig,
    Declaration,
)

KINDS = ("none", "average_pool", "similarity", "multi_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig(CompressorConfig):
    """One config for four kinds, so that changing one field gives the ablations."""

    width: int
    heads: int
    grid: int  # C: an image becomes C*C tokens
    norm_eps: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f'compressor "{self.kind}" is unknown among those to C*C tokens; use one of '
                f"{', '.join(KINDS)}"
            )
        if self.grid < 1:
            raise ValueError(f"grid is {self.grid}; give 1 or more: its square is the tokens")
        # Positions are sines and cosines of rows and of columns: a quarter of the width each.
        if self.kind in ("similarity", "multi_head") and self.width % 4:
            raise ValueError(f"compressor width {self.width} is not a multiple of 4")
        if self.kind == "multi_head" and (self.heads < 1 or self.width % self.heads):
            raise ValueError(f"compressor width {self.width} is not divided by {self.heads} heads")


def declare(cfg: GridConfig) -> Declaration:
    """The paper's place is behind the projector, the release's in front of it."""
    return Declaration(places=(PROJECTED, FEATURES), parts=True, videos=True)


def tokens(cfg: GridConfig, side: int) -> int:
    return cfg.grid**2
