"""What a table came to: TABLE.csv, TABLE.png and TABLE.md, our scores beside the paper's.

Plan's results --collect--> Trained rows --> CSV, plot
                                 '--judge--> which of the paper's claims hold
"""

import csv
import dataclasses
import datetime
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.analysis import plots
from llava_mini_jax.evaluation.report import versions
from llava_mini_jax.journal import write_whole
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.profiling import flops, paper
from llava_mini_jax.reproduce import runs
from llava_mini_jax.reproduce.scales import METRICS, Plan
from llava_mini_jax.reproduce.tables import BENCHMARKS, ROWS, TABLES, Claim, Row

_NOTHING = "–"
FLOPS = {"digits": ("MFLOPs", 1e6), "full": ("TFLOPs", 1e12)}
PAPER = ("tokens", *BENCHMARKS)  # what is known of the paper's row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A row of a table with what has been measured of it."""

    name: str
    row: Row
    model: LlavaMiniConfig | None  # None: the paper's figures only
    grid: int  # of its images' parts
    scores: Mapping[int, float]  # by seed; those that are done

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values()) if self.scores else math.nan

    @property
    def paper(self) -> float:
        return statistics.mean(self.row.paper) if self.row.paper else math.nan

    @property
    def tokens(self) -> int | None:
        parts = 1 if self.grid == 1 else self.grid**2 + 1
        return self.model and self.model.tokens_per_image(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim against scores: the smallest of its steps, in points, and what it should be."""

    step: float
    error: float  # standard error of that step over seeds; NaN for one seed
    by: float

    def __str__(self) -> str:
        if math.isnan(self.step):
            return _NOTHING
        word = "holds" if self.step >= self.by else "does not hold"
        if abs(self.step - self.by) < 2 * self.error:
            word += ", not clearly"
        spread = "" if math.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{word} ({self.step:+.1f}{spread})"


def collect(table: str, plan: Plan, seeds: Sequence[int], out: Path) -> list[Trained]:
    found = []
    for name in TABLES[table].rows:
        jobs = {
            seed: plan.jobs[plan.names[name, seed]] for seed in seeds if (name, seed) in plan.names
        }
        scores = {seed: runs.score_of(job, out) for seed, job in jobs.items()}
        stage = next(iter(jobs.values())).stages[-1] if jobs else None
        found.append(
            Trained(
                name=name,
                row=ROWS[name],
                model=stage and stage.model,
                grid=stage.images.grid if stage else 1,
                scores={seed: score for seed, score in scores.items() if score is not None},
            )
        )
    return found


def judge(claim: Claim, scores: Mapping[str, Mapping[int, float]]) -> Verdict:
    """By the means over the seeds that all rows of the claim have."""
    rows = [scores.get(name, {}) for name in claim.order]
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    if not seeds:
        return Verdict(step=math.nan, error=math.nan, by=claim.by)
    steps = [
        [after[seed] - before[seed] for seed in seeds] for before, after in itertools.pairwise(rows)
    ]
    smallest = min(steps, key=statistics.mean)
    error = statistics.stdev(smallest) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    return Verdict(step=statistics.mean(smallest), error=error, by=claim.by)


def write(
    table: str, scale: str, trained: Sequence[Trained], out: Path, command: str, cut: str
) -> list[Path]:
    """The table's files in `out`. `cut` says what was made shorter for a trial, or is empty."""
    files = [out / f"{table}.{ending}" for ending in ("csv", "md", "png")]
    write_whole(files[0], _csv(trained))
    _plot(table, scale, trained, files[2])
    write_whole(files[1], _markdown(table, scale, trained, command, cut))
    return files


def _csv(trained: Sequence[Trained]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = ("row", "label", "layers", "tokens", "seed", "score")
    writer.writerow([*ours, *(f"paper_{name}" for name in PAPER)])
    for each in trained:
        layers = each.model.prefusion_layers if each.model else ""
        start = [each.name, each.row.label, layers, each.tokens]
        end = [each.row.tokens, *each.row.paper]
        for seed, score in sorted(each.scores.items()) or [("", "")]:
            writer.writerow([*start, seed, f"{score:.3f}" if each.scores else "", *end])
    return text.getvalue()


def _markdown(name: str, scale: str, trained: Sequence[Trained], command: str, cut: str) -> str:
    table = TABLES[name]
    unit, _ = FLOPS[scale]
    header = ["model", "layers", "tokens", unit, METRICS[scale], "seeds"]
    header += ["paper: tokens", "VQAv2", "GQA", "MMBench"]
    lines = [f"# {table.title}", "", f"{table.source}. `{command}`", ""]
    if cut:
        lines += [f"**A trial: {cut}. These scores mean nothing.**", ""]
    lines += [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    lines += [_row(_cells(each, scale)) for each in trained]
    lines += ["", _row(["what the paper says", "here", "in the paper"]), _row(["---"] * 3)]
    lines += [_row(line) for line in claims(name, trained)]
    about = versions()
    lines += [
        "",
        "Brackets: the smallest step between the rows that a claim compares, in points of the mean"
        ' score, with its standard error over seeds; "not clearly" where the bound is within two of'
        f" them. The paper's scores are the means of its three benchmarks. {unit}: one picture and"
        f" {paper.TEXT} tokens of text, by `profiling/flops.py`.",
        *(["", table.note] if table.note else []),
        "",
        f"![{table.title}]({name}.png)",
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, Python {about['python']},"
        f" jax {about.get('jax', '?')}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(each: Trained, scale: str) -> list[Any]:
    cells: list[Any] = [each.row.label]
    if each.model is None:
        cells += [_NOTHING] * 5
    else:
        cfg = each.model
        size = paper.shape(cfg, paper.TEXT, each.grid * cfg.vision.image_size)
        total = sum(flops.forward_flops(cfg, size).values()) / FLOPS[scale][1]
        seeds = " ".join(f"{score:.1f}" for _, score in sorted(each.scores.items()))
        mean = f"**{each.mean:.1f}**" if each.scores else _NOTHING
        layers = cfg.prefusion_layers or (f"{cfg.inside_layers} inside" if cfg.inside_layers else 0)
        cells += [layers, each.tokens, f"{total:.3g}", mean, seeds or _NOTHING]
    scores = [f"{score:.1f}" for score in each.row.paper] or [_NOTHING] * 3
    return [*cells, each.row.tokens or _NOTHING, *scores]


def claims(name: str, trained: Sequence[Trained]) -> list[tuple[str, Verdict, Verdict]]:
    """A table's claims, each against our scores and against the paper's."""
    ours = {each.name: each.scores for each in trained}
    theirs = {each.name: {0: each.paper} for each in trained if each.row.paper}
    return [(claim.text, judge(claim, ours), judge(claim, theirs)) for claim in TABLES[name].claims]


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(_NOTHING if cell is None else cell) for cell in cells) + " |"


def _plot(name: str, scale: str, trained: Sequence[Trained], path: Path) -> None:
    """Every seed's score and their mean, row by row; beside it the paper's."""
    plt = plots.pyplot()
    shown = [each for each in trained if each.scores or each.row.paper]
    height = 1.6 + 0.42 * len(shown)
    figure, (ours, theirs) = plt.subplots(
        1, 2, figsize=(9.5, height), sharey=True, layout="constrained"
    )
    for place, each in enumerate(shown):
        scores = list(each.scores.values())
        ours.plot(scores, [place] * len(scores), "o", color="tab:blue", alpha=0.35)
        ours.plot([each.mean], [place], "D", color="tab:blue")
        theirs.plot([each.paper], [place], "s", color="tab:red")
    ours.set_yticks(range(len(shown)), [_named(each) for each in shown])
    ours.invert_yaxis()
    ours.set_xlabel(METRICS[scale])
    ours.set_title("here: seeds (discs), mean (diamond)", fontsize=10)
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
