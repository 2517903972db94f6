"""What a table of `llava-mini reproduce` is made of.

TableRow: a model, at two scales (config file; arguments of `config.build`), published scores
Claim: an order of rows that is stated      Table: rows and claims
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llava_mini_jax.models.compressors import CompressorConfig

# Of the paper's ablations; of VQAv2 it has test-dev, whose answers its server alone knows.
BENCHMARKS = ("vqav2_val", "gqa", "mmbench")


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A row's model in the digits world, where a page has 9 patches."""

    model: Mapping[str, Any]  # arguments of `config.build`
    # A compressor that has sizes of its own, of the widths of tower and language model.
    compressor: Callable[[int, int], CompressorConfig] | None = None
    draw_tokens: tuple[int, ...] = ()  # numbers of tokens that rows of a batch are trained with
    dense: bool = False  # pages of twice the tower's resolution, 6 x 6 digits
    grid: int = 1  # images are read as grid x grid parts and the whole (1: the whole only)


@dataclasses.dataclass(frozen=True)
class TableRow:
    label: str
    tokens: int | None = None  # vision tokens of an image where the scores are from, of 576
    # Its published scores on BENCHMARKS, None for one that is not; empty where it has none.
    paper: tuple[float | None, ...] = ()
    full: str | None = None  # the config of the paper's scale: a name in configs/
    digits: World | None = None
    asks: tuple[str, int] | None = None  # (row, n): that row's model, asked for n tokens an image
    unlike: str = ""  # in what the published scores are not comparable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """Each row of `order` scores at least what the one before scores, plus `by`, in points."""

    text: str
    order: tuple[str, ...]
    by: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    source: str  # where in the paper
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]
    note: str = ""
    curves: bool = False  # rows of one label are a curve: scores over tokens and over FLOPs
