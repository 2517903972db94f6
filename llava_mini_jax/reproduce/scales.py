"""The two scales at which tables are trained anew: the digits world on CPU, and the paper's.

              once                   a seed     a seed and row            scored by
    digits    captions, questions    stage 1    stage 2, its model        exact match
    full      -                      stage 1    stage 2, its config file  VQAv2 val, GQA, MMBench

`plan` makes jobs of them: stages of train.py in a workdir of their own, and an evaluation. A row
whose compressor is the projector has a stage 1 of its own; one that asks another row's model for
another number of tokens trains nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image.digits import DENSE
from llava_mini_jax.models.compressors.signature import INSTEAD
from llava_mini_jax.reproduce.rows import BENCHMARKS, World
from llava_mini_jax.reproduce.tables import ROWS
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
    asks: "Job | None" = None  # without stages: whose model it asks
    vision_tokens: int | None = None  # of an image, asked for; None: as many as it gives unasked

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def last(self) -> TrainConfig:
        """The stage whose model is asked."""
        return (self.asks or self).stages[-1]

    def model(self, out: Path) -> Path:
        return out / (self.asks or self).name / self.last.name / "model"

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
            made = make(configs, row, seed, first, out)
            for job in made:
                jobs.setdefault(job.name, job)
            if made:
                names[row, seed] = made[-1].name
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


def _digits_row(configs: Path, row: str, seed: int, first: list[Job], out: Path) -> list[Job]:
    """The row's job behind those that only it needs; none where the row is not of this scale."""
    if (asked := ROWS[row].asks) is not None:
        *before, trained = _digits_row(configs, asked[0], seed, first, out)
        return [*before, trained, _asking(f"{row}-seed{seed}", trained, asked[1])]
    world, (start, needed) = ROWS[row].digits, first
    if world is None:
        return []
    file, before = configs / "digits_tables.py", []
    *_, stage1, stage2 = stages_of(load_config(str(file)))
    stage = _in_world(stage2, world)
    if _is_projector(stage):
        own = dataclasses.replace(stage1, trainable=_COMPRESSOR, fresh=_COMPRESSOR)
        aligned = _from(_modelled(own, world), seed, start.model(out))
        needed = Job(
            name=f"stage1-{row}-seed{seed}", needs=start.name, config=file, stages=(aligned,)
        )
        before = [needed]
    return [
        *before,
        Job(
            name=f"{row}-seed{seed}",
            needs=needed.name,
            config=file,
            stages=(_from(stage, seed, needed.model(out)),),
            benchmarks=("digits_dense" if world.dense else "digits",),
        ),
    ]


_COMPRESSOR = ("compressor/*",)


def _asking(name: str, trained: Job, count: int) -> Job:
    return dataclasses.replace(
        trained, name=name, needs=trained.name, stages=(), asks=trained, vision_tokens=count
    )


def _is_projector(stage: TrainConfig) -> bool:
    """Whether a stage 1 of its own has to align it; captions have no question to be read."""
    return stage.model.compress == INSTEAD and not stage.model.declared.question


def _modelled(stage: TrainConfig, world: World) -> TrainConfig:
    """The stage with the model of a row."""
    model = dict(world.model)
    if world.compressor is not None:
        old = stage.model
        model["compressor"] = world.compressor(old.vision.width, old.llm.width)
    return rebuilt(stage, **model)


def _in_world(stage: TrainConfig, world: World) -> TrainConfig:
    stage = _modelled(stage, world)
    images, data = dataclasses.replace(stage.images, grid=world.grid), stage.data
    if world.dense:
        data = dataclasses.replace(data, **DENSE)
    return dataclasses.replace(stage, images=images, data=data, draw_tokens=world.draw_tokens)


def _full_start(configs: Path, seed: int) -> list[Job]:
    file = configs / "stage1_vicuna_7b.py"
    (stage1,) = stages_of(load_config(str(file)))
    aligned = dataclasses.replace(stage1, seed=seed)
    return [Job(name=f"stage1-seed{seed}", needs=None, config=file, stages=(aligned,))]


def _full_row(configs: Path, row: str, seed: int, first: list[Job], out: Path) -> list[Job]:
    name = ROWS[row].full
    if name is None:
        return []
    file = configs / ("ablations" if name.startswith("table") else "") / f"{name}.py"
    *before, stage = stages_of(load_config(str(file)))
    stages, needs = (_from(stage, seed, first[-1].model(out)),), first[-1].name
    if before:  # a stage 1 of its own
        stages = tuple(dataclasses.replace(each, seed=seed) for each in (*before, stage))
        needs = None
    return [
        Job(
            name=f"{name.replace('/', '-')}-seed{seed}",  # rows of several tables may be one config
            needs=needs,
            config=file,
            stages=stages,
            benchmarks=BENCHMARKS,
        )
    ]


def _from(stage: TrainConfig, seed: int, start: Path) -> TrainConfig:
    """The stage with initial values and data of a seed, from the model in `start`."""
    data = stage.data
    if isinstance(data, DigitsConfig):
        data = dataclasses.replace(data, seed=data.seed + 1000 * seed)
    return dataclasses.replace(stage, seed=seed, data=data, start=str(start))
