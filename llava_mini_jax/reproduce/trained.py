"""What the runs of a table left: each row's scores, and whether the claims about them hold.

Jobs's results --collect--> Trained rows --judge--> Outcome of each claim
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_mini_jax.cost import flops, paper_figures
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.reproduce import runs
from llava_mini_jax.reproduce.rows import BENCHMARKS, Claim, TableRow
from llava_mini_jax.reproduce.scales import PARTS, Jobs
from llava_mini_jax.reproduce.tables import ROWS, TABLES

NOTHING = "–"
SCORE = "score"  # the mean over the parts that a scale's score has
Scores = Mapping[int, float]  # by seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A row of a table with what has been measured of it."""

    name: str
    row: TableRow
    model: LlavaMiniConfig | None  # None: the paper's figures only
    grid: int  # of its images' parts
    scores: Mapping[str, Scores]  # SCORE and its parts, by the seeds that are done
    asked: int | None = None  # vision tokens asked for of a model that has several numbers

    def mean(self, title: str) -> float:
        return statistics.mean(self.scores[title].values() or [math.nan])

    @property
    def paper(self) -> float:
        """The mean of the published scores; NaN where one of them is not."""
        known = [score for score in self.row.paper if score is not None]
        return statistics.mean(known) if len(known) == len(BENCHMARKS) else math.nan

    @property
    def tokens(self) -> int | None:
        """Of an image, that the language model's later layers read."""
        if self.model is None or self.asked is not None:
            return self.asked
        if (keeps := self.model.declared.keeps) is not None:
            return keeps[1]
        return self.model.tokens_per_image(1 if self.grid == 1 else self.grid**2 + 1)

    @property
    def flops(self) -> float:
        """Of one image and the paper's text; NaN for published figures alone."""
        if self.model is None:
            return math.nan
        cfg, asked = self.model, self.asked
        size = paper_figures.shape(cfg, paper_figures.TEXT, self.grid * cfg.vision.image_size)
        if asked is not None:
            more = asked - cfg.tokens_per_image(size.parts)
            size = dataclasses.replace(size, sequence=size.sequence + more)
        # Where the compressor reads the question: all of the text.
        question = min(paper_figures.TEXT, cfg.declared.question)
        return sum(flops.forward_flops(cfg, dataclasses.replace(size, question=question)).values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A claim against scores: the smallest of its steps, in points, and what it should be."""

    step: float
    error: float  # standard error of that step over seeds; NaN for one seed
    by: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.step):
            return NOTHING
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
        job = next(iter(jobs.values())) if jobs else None
        stage = job and job.last
        found.append(
            Trained(
                name=name,
                row=ROWS[name],
                model=stage and stage.model,
                grid=stage.images.grid if stage else 1,
                asked=job.vision_tokens if job else None,
                scores={
                    title: {seed: _mean(by_name, names) for seed, by_name in done.items()}
                    for title, names in columns(scale).items()
                },
            )
        )
    return found


def columns(scale: str) -> dict[str, list[str]]:
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


def claims(
    name: str, scale: str, trained: Sequence[Trained]
) -> list[tuple[str, dict[str, Outcome], Outcome]]:
    """A table's claims, each against our scores (SCORE and its parts) and against the paper's."""
    theirs = {each.name: {0: each.paper} for each in trained if not math.isnan(each.paper)}
    found = []
    for claim in TABLES[name].claims:
        ours = {
            title: judge(claim, {each.name: each.scores[title] for each in trained})
            for title in columns(scale)
        }
        found.append((claim.text, ours, judge(claim, theirs)))
    return found
