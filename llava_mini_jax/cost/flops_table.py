"""FLOPs of models side by side: formula, XLA's count, the paper's rule, the paper's figure.

paper.ROWS, or settings, or a folder's config --entries--> Entry (config, Shape)
                                                              |
                                        measure: TFLOPs by component, four ways
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llava_mini_jax.cost import paper_figures, xla
from llava_mini_jax.cost.baseline import llava_1_5
from llava_mini_jax.cost.flops import forward_flops
from llava_mini_jax.cost.network import Shape
from llava_mini_jax.cost.paper_figures import PARTS, Row
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Entry:
    table: str  # of the paper, or ""
    name: str
    cfg: LlavaMiniConfig
    size: Shape
    paper: float | None  # TFLOPs
    paper_parts: tuple[float, ...] | None


def of_paper(llm: LlamaConfig, text: int) -> list[Entry]:
    """The paper's tables; beside other backbones than Vicuna-7B its figures are left out."""
    from llava_mini_jax.config import VICUNA_7B

    rows = paper_figures.ROWS
    if llm != VICUNA_7B:
        rows = tuple(dataclasses.replace(row, tera=None, parts=None) for row in rows)
    return [_entry(row, llm, text) for row in rows]


def of_settings(
    llm: LlamaConfig,
    text: int,
    tokens: Sequence[int],
    layers: Sequence[int],
    resolutions: Sequence[int],
) -> list[Entry]:
    """Every combination, after LLaVA-1.5 at each resolution."""
    rows = []
    for side in resolutions:
        rows.append(Row(table="", tokens=0, layers=0, resolution=side, tera=None))
        rows += [
            Row(table="", tokens=q, layers=n, resolution=side, tera=None)
            for q in tokens
            for n in layers
        ]
    return [_entry(row, llm, text) for row in rows]


def of_model(cfg: LlavaMiniConfig, text: int, resolution: int) -> list[Entry]:
    """A model's own configuration, after LLaVA-1.5 with its tower and language model."""
    named = {"LLaVA-1.5, same parts": llava_1_5(cfg), "this model": cfg}
    return [
        Entry(
            "",
            f"{name}, {resolution} px",
            each,
            paper_figures.shape(each, text, resolution),
            None,
            None,
        )
        for name, each in named.items()
    ]


def _entry(row: Row, llm: LlamaConfig, text: int) -> Entry:
    cfg = paper_figures.build(row, llm)
    size = paper_figures.shape(cfg, text, row.resolution)
    return Entry(row.table, row.name, cfg, size, row.tera, row.parts)


def measure(entry: Entry, *, with_xla: bool) -> dict[str, Any]:
    """TFLOPs of one entry: "ours", "xla" (or None), "rule", "paper" (or None), by component.

    "ours" and "xla" are what this package computes for a first token: attention scores included,
    and without the layers and positions that nobody reads. "llm" includes the head.
    """
    ours = _grouped(forward_flops(entry.cfg, entry.size))
    counted = None
    if with_xla and not entry.cfg.inside_layers:
        counted = _grouped(xla.component_flops(entry.cfg, entry.size))
    rule = _tera(paper_figures.paper_flops(entry.cfg, entry.size))
    said: dict[str, float] | None = None
    if entry.paper is not None:
        parts = dict(zip(PARTS, entry.paper_parts or (), strict=entry.paper_parts is not None))
        said = parts | {"total": entry.paper}
    return {"ours": ours, "xla": counted, "rule": rule, "paper": said}


def _grouped(flops: dict[str, float]) -> dict[str, float]:
    """By the paper's columns, which count the head to the language model."""
    return _tera({**flops, "llm": flops["llm"] + flops["lm_head"]})


def _tera(flops: dict[str, float]) -> dict[str, float]:
    parts = {name: flops[name] / TERA for name in PARTS}
    return parts | {"total": sum(parts.values())}
