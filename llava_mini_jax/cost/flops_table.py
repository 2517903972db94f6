"""FLOPs of models side by side: formula, XLA's count, the paper's rule, the paper's figure.

paper.ROWS, or settings, or a folder's config --entries--> Entry (config, Shape)
                                                              |
                                        measure: TFLOPs by component, four ways
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from llava_mini_jax.config import VICUNA_7B
from llava_mini_jax.cost import paper_figures, xla
from llava_mini_jax.cost.baseline import llava_1_5
from llava_mini_jax.cost.flops import forward_flops
from llava_mini_jax.cost.network import Shape
from llava_mini_jax.cost.paper_figures import PARTS, PaperModel
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    cfg: LlavaMiniConfig
    size: Shape
    table: str = ""  # of the paper
    paper: dict[str, float] | None = None  # its TFLOPs by PARTS, if it says them, and "total"


def of_rows(rows: Iterable[PaperModel], llm: LlamaConfig, text: int) -> list[Entry]:
    """Rows around a language model; with another than Vicuna-7B no figure is the paper's."""
    entries = []
    for row in rows:
        cfg = paper_figures.build(row, llm)
        paper = None
        if row.tera is not None and llm == VICUNA_7B:
            parts = zip(PARTS, row.parts or (), strict=row.parts is not None)
            paper = {**dict(parts), "total": row.tera}
        size = paper_figures.shape(cfg, text, row.resolution)
        entries.append(Entry(row.name, cfg, size, row.table, paper))
    return entries


def of_model(cfg: LlavaMiniConfig, text: int, resolution: int) -> list[Entry]:
    """A model's own configuration, after LLaVA-1.5 with its tower and language model."""
    named = {"LLaVA-1.5, same parts": llava_1_5(cfg), "this model": cfg}
    return [
        Entry(f"{name}, {resolution} px", each, paper_figures.shape(each, text, resolution))
        for name, each in named.items()
    ]


def measure(entry: Entry, *, with_xla: bool) -> dict[str, Any]:
    """TFLOPs of one entry: "ours", "xla" (or None), "rule", "paper" (or None), by component.

    "ours" and "xla" are what this package computes for a first token: attention scores included,
    and without the layers and positions that nobody reads. "llm" includes the head.
    """
    counted = with_xla and not entry.cfg.inside_layers
    return {
        "ours": _tera(forward_flops(entry.cfg, entry.size)),
        "xla": _tera(xla.component_flops(entry.cfg, entry.size)) if counted else None,
        "rule": _tera(paper_figures.paper_flops(entry.cfg, entry.size)),
        "paper": entry.paper,
    }


def _tera(flops: dict[str, float]) -> dict[str, float]:
    """By the paper's columns, which count the head to the language model."""
    whole = flops | {"llm": flops["llm"] + flops.get("lm_head", 0.0)}
    parts = {name: whole[name] / TERA for name in PARTS}
    return parts | {"total": sum(parts.values())}
