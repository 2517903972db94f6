"""What a table came to: TABLE.csv, TABLE.png and TABLE.md, our scores beside the paper's.

Jobs's results --collect--> Trained rows --> CSV, plot
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

from llava_mini_jax import plots
from llava_mini_jax.cost import flops, paper_figures
from llava_mini_jax.evaluation.run.report import versions
from llava_mini_jax.journal import write_whole
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.reproduce import runs
from llava_mini_jax.reproduce.scales import METRICS, PARTS, Jobs
from llava_mini_jax.reproduce.tables import ROWS, TABLES, Claim, TableRow

_NOTHING = "–"
FLOPS = {"digits": ("MFLOPs", 1e6), "full": ("TFLOPs", 1e12)}
PAPER = ("tokens", "vqav2", "gqa", "mmbench")  # what is known of the paper's row

SCORE = "score"  # the mean over the parts that a scale's score has
_MARKERS = ("D", "^", "v", "<")  # of the score and its parts

Scores = Mapping[int, float]  # by seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A row of a table with what has been measured of it."""

    name: str
    row: TableRow
    model: LlavaMiniConfig | None  # None: the paper's figures only
    grid: int  # of its images' parts
    scores: Mapping[str, Scores]  # SCORE and its parts, by the seeds that are done

    def mean(self, title: str) -> float:
        return statistics.mean(self.scores[title].values() or [math.nan])

    @property
    def paper(self) -> float:
        return statistics.mean(self.row.paper) if self.row.paper else math.nan

    @property
    def tokens(self) -> int | None:
        parts = 1 if self.grid == 1 else self.grid**2 + 1
        return self.model and self.model.tokens_per_image(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A claim against scores: the smallest of its steps, in points, and what it should be."""

    step: float
    error: float  # standard error of that step over seeds; NaN for one seed
    by: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.step):
            return _NOTHING
        word = "holds" if self.step >= self.by else "does not hold"
        if abs(self.step - self.by) < _student(self.seeds) * self.error:
            word += ", not clearly"
        spread = "" if math.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{word} ({self.step:+.1f}{spread})"


def collect(table: str, scale: str, plan: Jobs, seeds: Sequence[int], out: Path) -> list[Trained]:
    found = []
    for name in TABLES[table].rows:
        jobs = {
            seed: plan.jobs[plan.names[name, seed]] for seed in seeds if (name, seed) in plan.names
        }
        results = {seed: runs.scores_of(job, out) for seed, job in jobs.items()}
        done = {seed: by_name for seed, by_name in results.items() if by_name}
        stage = next(iter(jobs.values())).stages[-1] if jobs else None
        found.append(
            Trained(
                name=name,
                row=ROWS[name],
                model=stage and stage.model,
                grid=stage.images.grid if stage else 1,
                scores={
                    title: {seed: _mean(by_name, names) for seed, by_name in done.items()}
                    for title, names in _columns(scale).items()
                },
            )
        )
    return found


def _columns(scale: str) -> dict[str, list[str]]:
    """What is a mean of what: the score of all parts, and each part by itself."""
    parts = {title: list(names) for title, names in PARTS[scale].items()}
    return {SCORE: [name for names in parts.values() for name in names], **parts}


def _mean(by_name: Mapping[str, float], names: Sequence[str]) -> float:
    """NaN where one is missing: a trial may not ask every kind, a test set may have no answers."""
    return statistics.mean(by_name.get(name, math.nan) for name in names)


def judge(claim: Claim, scores: Mapping[str, Scores]) -> Outcome:
    """By the means over the seeds that all rows of the claim have."""
    rows = [scores.get(name, {}) for name in claim.order]
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    if not seeds:
        return Outcome(step=math.nan, error=math.nan, by=claim.by, seeds=0)
    # Seed by seed: rows of a seed share data and initial values, and their luck cancels out.
    steps = [
        [after[seed] - before[seed] for seed in seeds] for before, after in itertools.pairwise(rows)
    ]
    smallest = min(steps, key=statistics.mean)
    error = statistics.stdev(smallest) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    return Outcome(step=statistics.mean(smallest), error=error, by=claim.by, seeds=len(seeds))


def _student(seeds: int) -> float:
    """Standard errors to either side of a mean that its 95 % interval takes: 4.3 of three seeds."""
    from scipy import stats

    return float(stats.t.ppf(0.975, seeds - 1)) if seeds > 1 else math.nan


def write(
    table: str, scale: str, trained: Sequence[Trained], out: Path, command: str, cut: str
) -> list[Path]:
    """The table's files in `out`. `cut` says what was made shorter for a trial, or is empty."""
    files = [out / f"{table}.{ending}" for ending in ("csv", "md", "png")]
    write_whole(files[0], _csv(scale, trained))
    _plot(table, scale, trained, files[2])
    write_whole(files[1], _markdown(table, scale, trained, command, cut))
    return files


def _csv(scale: str, trained: Sequence[Trained]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = ("row", "label", "layers", "tokens", "seed", *_columns(scale))
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
    header = ["what the paper says", "here", *PARTS[scale], "in the paper"]
    lines += ["", _row(header), _row(["---"] * len(header))]
    lines += [
        _row([text, *ours.values(), theirs]) for text, ours, theirs in claims(name, scale, trained)
    ]
    about = versions()
    lines += [
        "",
        f"A score is the mean of its parts: {', '.join(PARTS[scale])}. Brackets: the smallest step"
        " between the rows that a claim compares, in points, with its standard error over seeds;"
        ' "not clearly" where the bound is in the 95 % interval (Student\'s t) around the step. The'
        f" paper's scores are the means of its three benchmarks. {unit}: one picture and"
        f" {paper_figures.TEXT} tokens of text, by `cost/flops.py`.",
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
        cells += [_NOTHING] * (5 + len(PARTS[scale]))
    else:
        cfg = each.model
        size = paper_figures.shape(cfg, paper_figures.TEXT, each.grid * cfg.vision.image_size)
        total = sum(flops.forward_flops(cfg, size).values()) / FLOPS[scale][1]
        layers = cfg.prefusion_layers or (f"{cfg.inside_layers} inside" if cfg.inside_layers else 0)
        seeds = " ".join(_shown(score) for _, score in sorted(each.scores[SCORE].items()))
        mean, *parts = (_shown(each.mean(title)) for title in each.scores)
        cells += [layers, each.tokens, f"{total:.3g}", f"**{mean}**", seeds or _NOTHING, *parts]
    scores = [f"{score:.1f}" for score in each.row.paper] or [_NOTHING] * 3
    return [*cells, each.row.tokens or _NOTHING, *scores]


def _shown(score: float) -> str:
    return _NOTHING if math.isnan(score) else f"{score:.1f}"


def claims(
    name: str, scale: str, trained: Sequence[Trained]
) -> list[tuple[str, dict[str, Outcome], Outcome]]:
    """A table's claims, each against our scores (SCORE and its parts) and against the paper's."""
    theirs = {each.name: {0: each.paper} for each in trained if each.row.paper}
    found = []
    for claim in TABLES[name].claims:
        ours = {
            title: judge(claim, {each.name: each.scores[title] for each in trained})
            for title in _columns(scale)
        }
        found.append((claim.text, ours, judge(claim, theirs)))
    return found


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(_NOTHING if cell is None else cell) for cell in cells) + " |"


def _plot(name: str, scale: str, trained: Sequence[Trained], path: Path) -> None:
    """Every seed's score and their mean, row by row; beside it the paper's."""
    plt = plots.pyplot()
    shown = [each for each in trained if each.scores[SCORE] or each.row.paper]
    height = 1.6 + 0.42 * len(shown)
    figure, (ours, theirs) = plt.subplots(
        1, 2, figsize=(9.5, height), sharey=True, layout="constrained"
    )
    for place, each in enumerate(shown):
        scores = list(each.scores[SCORE].values())
        ours.plot(scores, [place] * len(scores), "o", color="tab:blue", alpha=0.35)
        theirs.plot([each.paper], [place], "s", color="tab:red")
    for title, marker in zip(_columns(scale), _MARKERS, strict=False):
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
