"""The two scales at which tables are trained anew: the digits world on CPU, and the paper's.

              once                   a seed     a seed and row            scored by
    digits    captions, questions    stage 1    stage 2, its model        exact match
    full      -                      stage 1    stage 2, its config file  VQAv2 val, GQA, MMBench

`plan` makes jobs of them: stages of train.py in a workdir of their own, and an evaluation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image.digits import DENSE
from llava_mini_jax.reproduce.tables import BENCHMARKS, ROWS, World
from llava_mini_jax.training.stages import TrainConfig, load_config, rebuilt, stages_of

SCALES = ("digits", "full")
METRICS = {"digits": "exact match, %", "full": "mean of VQAv2 val, GQA and MMBench"}
# The equal parts of a score: each the mean over benchmarks, or over kinds of question.
PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "digits": {"one digit": ("position", "largest"), "a line": ("row", "column")},
    "full": {"VQAv2 val": ("vqav2_val",), "GQA": ("gqa",), "MMBench": ("mmbench",)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Stages that are trained one after the other, then questions asked of the last one's model."""

    name: str  # and workdir, below the plan's folder
    needs: str | None  # the job from whose last model this one starts
    config: Path  # the file that the stages come from
    stages: tuple[TrainConfig, ...]
    benchmarks: tuple[str, ...] = ()  # none: it only prepares others

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def model(self, out: Path) -> Path:
        return out / self.name / self.stages[-1].name / "model"

    def results(self, out: Path) -> Path:
        return out / self.name / "eval" / "results.json"

    def is_done(self, out: Path) -> bool:
        return (self.results(out) if self.benchmarks else self.model(out)).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jobs:
    jobs: Mapping[str, Job]  # by name; each stands behind the one that it needs
    names: Mapping[tuple[str, int], str]  # the job of a row and a seed


def plan(scale: str, configs: Path, rows: Sequence[str], seeds: Sequence[int], out: Path) -> Jobs:
    """The jobs of those rows that the scale has.

    Raises InputError where `configs` is not the project's folder of that name.
    """
    if not (configs / "digits_tables.py").is_file():
        raise InputError(
            f"{configs} is not the project's folder of configs (it has no digits_tables.py): start"
            " in the project's folder, or give --configs DIR"
        )
    jobs: dict[str, Job] = {}
    names: dict[tuple[str, int], str] = {}
    for seed in seeds:
        first = (
            _digits_start(configs, seed, out) if scale == "digits" else _full_start(configs, seed)
        )
        jobs |= {job.name: job for job in first}
        for row in dict.fromkeys(rows):
            make = _digits_row if scale == "digits" else _full_row
            job = make(configs, row, seed, first[-1], out)
            if job is not None:
                jobs.setdefault(job.name, job)
                names[row, seed] = job.name
    return Jobs(jobs=jobs, names=names)


def _digits_start(configs: Path, seed: int, out: Path) -> list[Job]:
    file = configs / "digits_tables.py"
    *before, stage1, _ = stages_of(load_config(str(file)))
    start = Job(name="start", needs=None, config=file, stages=tuple(before))
    aligned = _from(stage1, seed, start.model(out))
    return [
        start,
        Job(name=f"stage1-seed{seed}", needs=start.name, config=file, stages=(aligned,)),
    ]


def _digits_row(configs: Path, row: str, seed: int, needed: Job, out: Path) -> Job | None:
    world = ROWS[row].digits
    if world is None:
        return None
    file = configs / "digits_tables.py"
    stage = _in_world(stages_of(load_config(str(file)))[-1], world)
    return Job(
        name=f"{row}-seed{seed}",
        needs=needed.name,
        config=file,
        stages=(_from(stage, seed, needed.model(out)),),
        benchmarks=("digits_dense" if world.dense else "digits",),
    )


def _in_world(stage: TrainConfig, world: World) -> TrainConfig:
    stage = rebuilt(stage, **world.model)
    images, data = dataclasses.replace(stage.images, grid=world.grid), stage.data
    if world.dense:
        data = dataclasses.replace(data, **DENSE)
    return dataclasses.replace(stage, images=images, data=data)


def _full_start(configs: Path, seed: int) -> list[Job]:
    file = configs / "stage1_vicuna_7b.py"
    (stage1,) = stages_of(load_config(str(file)))
    aligned = dataclasses.replace(stage1, seed=seed)
    return [Job(name=f"stage1-seed{seed}", needs=None, config=file, stages=(aligned,))]


def _full_row(configs: Path, row: str, seed: int, needed: Job, out: Path) -> Job | None:
    name = ROWS[row].full
    if name is None:
        return None
    file = configs / ("ablations" if name.startswith("table") else "") / f"{name}.py"
    (stage,) = stages_of(load_config(str(file)))
    return Job(
        name=f"{name}-seed{seed}",  # rows of several tables may be one config
        needs=needed.name,
        config=file,
        stages=(_from(stage, seed, needed.model(out)),),
        benchmarks=BENCHMARKS,
    )


def _from(stage: TrainConfig, seed: int, start: Path) -> TrainConfig:
    """The stage with initial values and data of a seed, from the model in `start`."""
    data = stage.data
    if isinstance(data, DigitsConfig):
        data = dataclasses.replace(data, seed=data.seed + 1000 * seed)
    return dataclasses.replace(stage, seed=seed, data=data, start=str(start))
