"""The paper's efficiency figures, the rule that reproduces them, and where they contradict.

    PaperModel (table, settings, the paper's TFLOPs) --config--> LlavaMiniConfig, Shape
                                                              |
                     paper_flops: linear layers only, all of them, at every position
                                                              |
                     reproducing_lengths: text lengths that give the paper's figure

The paper counts with calflops (section 5.3), which sees linear and convolution layers but no
attention scores. It ran on the authors' release: all 24 tower layers, compressed tokens inside
pre-fusion, whole last pre-fusion layer, logits of every position.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from llava_mini_jax import config as configs
from llava_mini_jax.cost.network import Shape, products
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

TEXT = 43  # tokens: the one length that the paper's consistent figures share
LENGTHS = range(1, 201)
PRINTED = 0.01  # TFLOPs: what the paper rounds to
PARTS = ("vision", "projector", "compressor", "prefusion", "llm")  # the columns of table 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A model of the paper's tables, or one like those; `tokens` 0 is LLaVA-1.5: all patches."""

    table: str = ""
    tokens: int
    layers: int  # of pre-fusion
    inside: int = 0  # layers of the LLM before compression inside of it (appendix E.3)
    resolution: int = 336
    tera: float | None = None  # the paper's TFLOPs
    parts: tuple[float, ...] | None = None  # the same by PARTS (table 14)

    @property
    def name(self) -> str:
        if not self.tokens:
            return f"LLaVA-1.5, {self.resolution} px"
        if self.inside:
            return f"inside the LLM, {self.resolution} px, C²={self.tokens}"
        return f"LLaVA-Mini, {self.resolution} px, C²={self.tokens}, N={self.layers}"


def _row(table: str, tokens: int, layers: int, tera: float | None, **more: Any) -> PaperModel:
    return PaperModel(table=table, tokens=tokens, layers=layers, tera=tera, **more)


ROWS = (
    _row("7", 0, 0, 8.55),
    *(_row("7", q, 0, t) for q, t in ((1, 0.96), (16, 1.16), (64, 1.79), (144, 2.85))),
    *(_row("7", 1, n, t) for n, t in ((1, 1.21), (2, 1.46), (3, 1.81), (4, 1.96))),
    _row("8", 4, 4, 2.01),
    _row("12", 1, 0, 1.84, inside=4),
    *(_row("13", q, 4, None) for q in (16, 64)),
    _row("14", 0, 0, 8.55, parts=(0.349, 0.024, 0, 0, 8.177)),
    _row("14", 1, 4, 1.96, parts=(0.349, 0.024, 0.001, 0.125, 1.460)),
    _row("14", 0, 0, 40.49, resolution=672, parts=(1.745, 0.121, 0, 0, 38.623)),
    _row("14", 1, 4, 7.19, resolution=672, parts=(1.745, 0.121, 0.009, 1.183, 4.131)),
    _row("(section 5.2)", 64, 4, 8.13, resolution=672),
)

# Table 13: milliseconds of a response (RTX 3090 24 GB, A100 40 GB, A800 80 GB), by vision tokens.
LATENCY_MS = {
    576: (198.75, 113.04, 87.43),
    1: (64.52, 38.64, 27.43),
    4: (65.52, 38.84, 27.71),
    16: (68.97, 39.28, 28.92),
    64: (80.10, 46.23, 34.65),
}

# What the paper says in one place and not in another. Figures of ours are `paper_flops` at TEXT.
CONTRADICTIONS = (
    "Table 14 splits LLaVA-Mini's 1.585 T behind compression wrongly at 336 px: pre-fusion is"
    " 1.004 T and the LLM .581 T, not .125 and 1.460. Table 7 says so too: each pre-fusion layer"
    " adds .25 T, and without any the whole model takes .96 T, less than table 14's LLM alone.",
    "Table 14 does the same at 672 px: pre-fusion is 4.73 T and the LLM .58 T, not 1.183 and"
    " 4.131. So pre-fusion is the largest part of LLaVA-Mini, not a minimal one (appendix E.5).",
    "Table 7's 1.81 T for 3 pre-fusion layers is not in line with its neighbours 1.21,"
    " 1.46, 1.96: it is 1.71 T.",
    "Table 14's 7.19 T at 672 px are of 1 vision token; the model that is evaluated at 672 px has"
    " 64 and takes 8.13 T (section 5.2), so its FLOPs are 80 % below LLaVA-1.5's, not 82 %.",
    "Table 14's .001 T of compression contradicts table 8's 2.42 G, which is the"
    " projections of keys and values: .0024 T.",
    "Table 12's 1.84 T for compression inside the LLM is 1.89 T by the rule of all other figures.",
    "Figure 9's 0.6 MB an image is a float32 logit vector (.12 MiB) plus .5 MiB of keys and values;"
    " the logits of an image's position are not needed.",
)


def rows(
    tokens: Sequence[int], layers: Sequence[int], resolutions: Sequence[int]
) -> list[PaperModel]:
    """Every combination, after LLaVA-1.5 at each resolution."""
    kinds = [(0, 0), *((q, n) for q in tokens for n in layers)]
    return [
        PaperModel(tokens=q, layers=n, resolution=side) for side in resolutions for q, n in kinds
    ]


def build(row: PaperModel, llm: LlamaConfig) -> LlavaMiniConfig:
    """The row's model around `llm`: the release's dialect, which is what the paper measured.

    Raises InputError for a number of tokens that is no square.
    """
    vision = configs.CLIP_L_336
    if not row.tokens:
        return configs.build(llm, vision, "paper", compressor="none", prefusion_layers=0)
    grid = math.isqrt(row.tokens)
    if grid**2 != row.tokens:
        raise InputError(
            f"{row.tokens} vision tokens are not a square number; C*C queries form a grid: give"
            f" {grid**2} or {(grid + 1) ** 2}"
        )
    if row.inside:
        return configs.build(llm, vision, "paper", grid=grid, inside_layers=row.inside)
    return configs.build(llm, vision, "release", grid=grid, prefusion_layers=row.layers)


def shape(cfg: LlavaMiniConfig, text: int, resolution: int) -> Shape:
    """One row with one image: `text` tokens beside it, logits of the last position.

    Raises InputError for a resolution that is not a multiple of the tower's.
    """
    side = cfg.vision.image_size
    times = resolution // side
    if times < 1 or resolution % side:
        raise InputError(
            f"a resolution of {resolution} pixels is not a multiple of the tower's {side}; give"
            f" {side}, {2 * side} or another multiple"
        )
    parts = 1 if times == 1 else times**2 + 1
    return Shape(
        rows=1,
        images=1,
        parts=parts,
        text=text,
        sequence=text + cfg.tokens_per_image(parts),
        wide=text + cfg.patches_per_image(parts) if cfg.inside_layers else 0,
        logits=1,
    )


def paper_flops(cfg: LlavaMiniConfig, size: Shape) -> dict[str, float]:
    """FLOPs by the paper's rule, by component (PARTS; "llm" has the head in it).

    `forward_flops` counts what must be computed; this one what calflops saw of the release: only
    linear layers and convolutions, and all that the release computes, read or not.
    """
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for product in products(cfg, size, unread=True):
        if product.linear:
            found["llm" if product.component == "lm_head" else product.component] += product.flops
    return found


def reproducing_lengths(row: PaperModel, llm: LlamaConfig) -> list[int]:
    """Text lengths at which the rule, rounded as the paper prints it, gives the paper's figure."""
    if row.tera is None:
        return []
    cfg, found = build(row, llm), []
    for text in LENGTHS:
        total = sum(paper_flops(cfg, shape(cfg, text, row.resolution)).values())
        if abs(total / 1e12 - row.tera) <= 0.5 * PRINTED:
            found.append(text)
    return found


def shared_length(rows: Sequence[PaperModel], llm: LlamaConfig) -> tuple[int, int, int]:
    """(text length that most rows' figures agree with, how many do, of how many)."""
    lengths = [reproducing_lengths(row, llm) for row in rows if row.tera is not None]
    votes = {text: sum(text in each for each in lengths) for text in LENGTHS}
    best = max(votes, key=lambda text: votes[text])
    return best, votes[best], len(lengths)
