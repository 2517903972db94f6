"""Any number of tokens from one set of parameters: the paper's compressor with queries for each.

    query_QE --way--> the queries of every count, one count behind the other --.
    patches_IPE --> keys (+ 2-D position), values (without position) ----------+--> tokens_IQE
                                         a request takes those of its count (signature.py: Choice)

Every query reads the patches as the paper's do (similarity.py), and none meets another. The ways:

    prefix     the first n of one ordered table (as in MQT); each has a place of the finest grid,
               and places are ordered so that any first ones are spread over the image
    grids      the finest grid's queries, averaged over the windows of a coarser grid (as M3
               averages patches), positions with them
    separate   queries of each grid's own: n tokens are the paper's compressor of n tokens

0 tokens are pre-fusion alone. Tokens of all counts are made, and the host takes some of them, so
that rows of a batch and requests of an engine may differ: 850 queries of 24 x 24 patches are 2 % of
the tower's work.

Dimensions: I images, P patches, Q tokens of all counts, E width, G side of the finest grid.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax.models.compressors.positions import sincos
from llava_mini_jax.models.compressors.signature import (
    PROJECTED,
    Choice,
    Compressed,
    CompressorConfig,
    Declaration,
    side_of,
)
from llava_mini_jax.models.compressors.similarity import read
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal

WAYS = ("prefix", "grids", "separate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedConfig(CompressorConfig):
    kind: str = "nested"
    way: str  # of WAYS
    width: int
    counts: tuple[int, ...]  # tokens that a request may ask for: square numbers that grow
    count: int  # of a request that does not ask

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f'nested has no way "{self.way}"; use one of {", ".join(WAYS)}')
        squares = all(n >= 0 and math.isqrt(n) ** 2 == n for n in self.counts)
        if not squares or list(self.counts) != sorted({*self.counts}):
            raise ValueError(f"nested: counts are {self.counts}; give square numbers that grow")
        if not any(self.counts):
            raise ValueError(f"nested: counts are {self.counts}; give one above 0")
        if self.count not in self.counts:
            raise ValueError(
                f"nested has no {self.count} tokens; use one of {', '.join(map(str, self.counts))}"
            )
        if self.width % 4:  # sines and cosines of rows and of columns
            raise ValueError(f"compressor width {self.width} is not a multiple of 4")

    @property
    def grids(self) -> tuple[int, ...]:
        """The sides of the counts' grids, without that of 0 tokens."""
        return tuple(math.isqrt(n) for n in self.counts if n)


Config = NestedConfig


@struct.dataclass
class Nested:
    query: Leaf


def declare(cfg: NestedConfig) -> Declaration:
    # A prefix begins where all do; grids stand one behind the other.
    sizes = [0 if cfg.way == "prefix" else n for n in cfg.counts]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    made = cfg.counts[-1] if cfg.way == "prefix" else sum(sizes)
    choice = Choice(made, tuple(zip(cfg.counts, starts, strict=True)))
    return Declaration(places=(PROJECTED,), parts=True, videos=True, choice=choice)


def tokens(cfg: NestedConfig, side: int) -> int:
    if cfg.counts[-1] > side * side:
        raise ValueError(
            f"nested has no {cfg.counts[-1]} tokens of {side} x {side} patches; give counts up to"
            f" {side * side}"
        )
    return cfg.count


def spec(cfg: NestedConfig) -> Nested:
    rows = sum(cfg.counts) if cfg.way == "separate" else cfg.counts[-1]
    return Nested(query=ParamSpec((rows, cfg.width), (None, "norm"), normal(0.02)))


def apply(params: Nested, seen: Seen, cfg: NestedConfig) -> Compressed:
    return read(queries(params, cfg, seen.patches_IPE.dtype), seen.patches_IPE, side_of(seen))


def queries(params: Nested, cfg: NestedConfig, dtype: jnp.dtype) -> Array:
    """Those of all counts, positions added [Q, E]."""
    query_QE = params.query.astype(dtype)
    if cfg.way == "separate":
        tables = [sincos(grid, cfg.width) for grid in cfg.grids]
        return query_QE + np.concatenate(tables).astype(dtype)
    finest = cfg.grids[-1]
    placed_GE = sincos(finest, cfg.width)
    if cfg.way == "prefix":
        return query_QE + placed_GE[spread(finest)].astype(dtype)
    query_QE = query_QE + placed_GE.astype(dtype)
    means = np.concatenate([window_means(finest, grid) for grid in cfg.grids])
    return jnp.einsum("QG,GE->QE", means.astype(dtype), query_QE)


@functools.cache
def spread(grid: int) -> np.ndarray:
    """The grid's places [grid * grid], row-major numbers, in an order in which any first ones lie
    far apart: the middle, and each time the place that is farthest from all before it."""
    places = np.stack(np.divmod(np.arange(grid * grid), grid), axis=1).astype(np.float64)

    def away(place: int | np.ndarray) -> np.ndarray:
        return np.square(places - place).sum(axis=1)

    order = [int(away(np.full(2, (grid - 1) / 2)).argmin())]
    nearest = away(places[order[0]])
    while len(order) < grid * grid:
        order.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, away(places[order[-1]]))
    return np.array(order)


@functools.cache
def window_means(fine: int, coarse: int) -> np.ndarray:
    """Weights [coarse * coarse, fine * fine] of means over windows, in which a place that lies in
    several counts by its share: exact means where `coarse` divides `fine`."""
    edges = np.arange(coarse + 1) * fine / coarse
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(fine)
    along = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, None)
    along *= coarse / fine
    return np.einsum("ay,bx->abyx", along, along).reshape(coarse**2, fine**2).astype(np.float32)
