"""What a table came to: TABLE.csv, TABLE.png and TABLE.md, our scores beside the paper's.

Trained rows --> CSV, plot, and in Markdown which of the claims hold
"""

import csv
import datetime
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax import plots
from llava_mini_jax.cost import paper_figures
from llava_mini_jax.evaluation.run.report import versions
from llava_mini_jax.journal import write_whole
from llava_mini_jax.reproduce import curves
from llava_mini_jax.reproduce.rows import BENCHMARKS
from llava_mini_jax.reproduce.scales import METRICS, PARTS
from llava_mini_jax.reproduce.tables import TABLES
from llava_mini_jax.reproduce.trained import NOTHING, SCORE, Trained, claims, columns

FLOPS = {"digits": ("MFLOPs", 1e6), "full": ("TFLOPs", 1e12)}
PAPER = ("tokens", "vqav2", "gqa", "mmbench")  # what is known of the paper's row

_MARKERS = ("D", "^", "v", "<")  # of the score and its parts


def write(
    table: str, scale: str, trained: Sequence[Trained], out: Path, command: str, cut: str
) -> list[Path]:
    """The table's files in `out`. `cut` says what was made shorter for a trial, or is empty."""
    files = [out / f"{table}.{ending}" for ending in ("csv", "md", "png")]
    write_whole(files[0], _csv(scale, trained))
    if TABLES[table].curves:
        curves.plot(TABLES[table].title, trained, METRICS[scale], FLOPS[scale], files[2])
    else:
        _plot(table, scale, trained, files[2])
    write_whole(files[1], _markdown(table, scale, trained, command, cut))
    return files


def _csv(scale: str, trained: Sequence[Trained]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = ("row", "label", "layers", "tokens", "seed", *columns(scale))
    writer.writerow([*ours, *(f"paper_{name}" for name in PAPER)])
    for each in trained:
        layers = each.model.prefusion_layers if each.model else ""
        start = [each.name, each.row.label, layers, each.tokens]
        end = [each.row.tokens, *each.row.paper]
        for seed in sorted(each.scores[SCORE]):
            scores = (f"{by_seed[seed]:.3f}" for by_seed in each.scores.values())
            writer.writerow([*start, seed, *scores, *end])
        if not each.scores[SCORE]:
            writer.writerow([*start, "", *[""] * len(each.scores), *end])
    return text.getvalue()


def _markdown(name: str, scale: str, trained: Sequence[Trained], command: str, cut: str) -> str:
    table = TABLES[name]
    unit, _ = FLOPS[scale]
    header = ["model", "layers", "tokens", unit, METRICS[scale], "seeds", *PARTS[scale]]
    header += ["paper: tokens", "VQAv2", "GQA", "MMBench"]
    lines = [f"# {table.title}", "", f"{table.source}. `{command}`", ""]
    if cut:
        lines += [f"**A trial: {cut}. These scores mean nothing.**", ""]
    lines += [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    lines += [_row(_cells(each, scale)) for each in trained]
    header = ["claim", "here", *PARTS[scale], "in the paper"]
    lines += ["", _row(header), _row(["---"] * len(header))]
    lines += [
        _row([text, *ours.values(), theirs]) for text, ours, theirs in claims(name, scale, trained)
    ]
    about = versions()
    shown = "scores over tokens and FLOPs" if table.curves else "scores here and in the paper"
    lines += [
        "",
        f"A score is the mean of its parts: {', '.join(PARTS[scale])}. Brackets give the smallest"
        " step between the rows that a claim compares, in points, with its standard error over"
        ' seeds. "Not clearly" means that the bound lies in the 95 % interval (Student\'s t) around'
        f" the step. The paper's scores are the means of its three benchmarks. {unit} are those of"
        f" one image and {paper_figures.TEXT} tokens of text, by `cost/flops.py`.",
        *(["", table.note] if table.note else []),
        *_unlike(trained),
        "",
        f"![{table.title}: {shown}]({name}.png)",
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, Python {about['python']},"
        f" jax {about.get('jax', '?')}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(each: Trained, scale: str) -> list[Any]:
    cells: list[Any] = [each.row.label]
    if each.model is None:
        cells += [NOTHING] * (5 + len(PARTS[scale]))
    else:
        cfg, total = each.model, each.flops / FLOPS[scale][1]
        layers = cfg.prefusion_layers or (f"{cfg.inside_layers} inside" if cfg.inside_layers else 0)
        seeds = " ".join(_shown(score) for _, score in sorted(each.scores[SCORE].items()))
        mean, *parts = (_shown(each.mean(title)) for title in each.scores)
        cells += [layers, each.tokens, f"{total:.3g}", f"**{mean}**", seeds or NOTHING, *parts]
    scores = [NOTHING if score is None else f"{score:.1f}" for score in each.row.paper]
    return [*cells, each.row.tokens or NOTHING, *(scores or [NOTHING] * len(BENCHMARKS))]


def _unlike(trained: Sequence[Trained]) -> list[str]:
    """In what published scores do not compare with ours, a line for each kind."""
    kinds: dict[str, list[str]] = {}
    for each in trained:
        if each.row.unlike and each.row.label not in kinds.setdefault(each.row.unlike, []):
            kinds[each.row.unlike].append(each.row.label)
    return ["", *(f"- {', '.join(labels)}: {what}." for what, labels in kinds.items())] * bool(
        kinds
    )


def _shown(score: float) -> str:
    return NOTHING if math.isnan(score) else f"{score:.1f}"


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(NOTHING if cell is None else cell) for cell in cells) + " |"


def _plot(name: str, scale: str, trained: Sequence[Trained], path: Path) -> None:
    """Every seed's score and their mean, row by row; beside it the paper's."""
    plt = plots.pyplot()
    shown = [each for each in trained if each.scores[SCORE] or not math.isnan(each.paper)]
    height = 1.6 + 0.42 * len(shown)
    figure, (ours, theirs) = plt.subplots(
        1, 2, figsize=(9.5, height), sharey=True, layout="constrained"
    )
    for place, each in enumerate(shown):
        scores = list(each.scores[SCORE].values())
        ours.plot(scores, [place] * len(scores), "o", color="tab:blue", alpha=0.35)
        theirs.plot([each.paper], [place], "s", color="tab:red")
    for title, marker in zip(columns(scale), _MARKERS, strict=False):
        means = [each.mean(title) for each in shown]
        colour = "tab:blue" if title == SCORE else "tab:gray"
        ours.plot(means, range(len(shown)), marker, color=colour, label=title)
    figure.legend(loc="outside lower left", ncols=len(_MARKERS), fontsize=9)
    ours.set_yticks(range(len(shown)), [_named(each) for each in shown])
    ours.invert_yaxis()
    ours.set_xlabel(METRICS[scale])
    ours.set_title("here: means, and seeds (discs)", fontsize=10)
    theirs.set_xlabel("mean of VQAv2, GQA and MMBench")
    theirs.set_title("the paper, 7B", fontsize=10)
    for axis in (ours, theirs):
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.08)
    figure.suptitle(f"{TABLES[name].title} ({TABLES[name].source})")
    plots.save(figure, path)


def _named(each: Trained) -> str:
    here, there = each.tokens, each.row.tokens
    counts = [f"{here} here"] * bool(here) + [f"{there} paper"] * bool(there)
    return f"{each.row.label}\ntokens: {', '.join(counts)}"
