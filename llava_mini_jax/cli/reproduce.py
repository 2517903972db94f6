"""`llava-mini reproduce`: trains the rows of the paper's tables, and says which of its claims hold.

TABLE..., --scale, --seeds --> Jobs of jobs --what is not done yet--> processes --> OUT/JOB/
                                     '--> OUT/TABLE.md, .csv, .png; the claims to stdout
"""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llava_mini_jax.arguments import refuse
from llava_mini_jax.errors import InputError

if TYPE_CHECKING:
    from llava_mini_jax.reproduce.scales import Job, Jobs

SUMMARY = "retrain the rows of the paper's tables and compare the scores"
USAGE = "llava-mini reproduce TABLE... [--scale digits|full] [options]"
EXAMPLE = """tables: table7 (pre-fusion), tokens, hd, table8, table10, table11, table12,
  compressors, dense, or all
examples:
  llava-mini reproduce table7
  llava-mini reproduce all --seeds 0,1,2 --jobs 2 --out out/reproduce
  llava-mini reproduce table8 --scale full --dry-run     print the commands, for a cluster
  llava-mini reproduce table8 --scale full --collect     the page from their output"""

DATA = Path("playground/data/eval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="+", metavar="TABLE", help="table7, tokens, compressors ... or all")
    add("--scale", choices=("digits", "full"), default="digits", help="digits (default), or 7B")
    add("--seeds", metavar="A,B", help="default: 0,1,2; full: 0")
    add("--out", type=Path, metavar="DIR", help="default: out/reproduce/SCALE")
    add("--configs", type=Path, default=Path("configs"), metavar="DIR", help="default: configs")
    add("--data", type=Path, metavar="DIR", help=f"full: the benchmarks' files; default: {DATA}")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one a core; full: 1)")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--collect", action="store_true", help="make the pages from existing results")
    trial = parser.add_argument_group("for a trial, whose scores mean nothing").add_argument
    trial("--steps", type=int, metavar="N", help="train each stage for N steps only")
    trial("--limit", type=int, metavar="N", help="ask only N questions")


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax import plots
    from llava_mini_jax.reproduce import page, runs, scales
    from llava_mini_jax.reproduce.tables import TABLES
    from llava_mini_jax.reproduce.trained import claims, collect

    _refuse(args)
    plots.pyplot()  # before anything takes long
    names = list(TABLES) if args.tables == ["all"] else list(dict.fromkeys(args.tables))
    for name in names:
        if name not in TABLES:
            raise InputError(f'"{name}" is not a table; give all, or some of {", ".join(TABLES)}')
    for option in ("jobs", "steps", "limit"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise InputError(f"--{option} is {number}; give 1 or more")
    full = args.scale == "full"
    seeds = _seeds(args.seeds or ("0" if full else "0,1,2"))
    out = args.out or Path("out/reproduce") / args.scale
    rows = [row for name in names for row in TABLES[name].rows]
    plan = scales.plan(args.scale, args.configs, rows, seeds, out)
    if args.steps:
        plan = _shortened(plan, args.steps)
    if args.dry_run:
        _tell(plan, out, args)
        return 0
    if not args.collect:
        workers = args.jobs or (1 if full else _cores())
        runs.run(plan.jobs, out, workers=workers, data=args.data or DATA, limit=args.limit)
    elif not out.is_dir():
        raise InputError(f"{out} does not exist; run without --collect, or give --out")
    else:
        runs.check_same(plan.jobs, out, args.limit)
    for name in names:
        trained = collect(name, args.scale, plan, seeds, out)
        command = f"llava-mini reproduce {name} --scale {args.scale} --seeds {_listed(seeds)}"
        files = page.write(name, args.scale, trained, out, command, _cut(args))
        print(f"\n{TABLES[name].title} ({TABLES[name].source})")
        for claim, ours, theirs in claims(name, args.scale, trained):
            score, *parts = ours.items()
            print(f"  {claim}\n    here: {score[1]}; in the paper: {theirs}")
            print("    " + "; ".join(f"{title}: {verdict}" for title, verdict in parts))
        print("written:", *files)
    return 0


def _refuse(args: argparse.Namespace) -> None:
    """A dry run has all options of the run that it tells of."""
    if args.scale == "digits":
        refuse(args, ["data"], "with --scale digits")
    if args.dry_run:
        refuse(args, ["collect"], "with --dry-run")
    if args.collect:
        refuse(args, ["data", "jobs"], "with --collect")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds is {text!r}; give numbers such as 0,1,2") from None
    if min(seeds) < 0:
        raise InputError(f"--seeds is {text}; give numbers from 0 on")
    return list(dict.fromkeys(seeds))


def _listed(seeds: list[int]) -> str:
    return ",".join(map(str, seeds))


def _cores() -> int:
    # A scheduler may have left this process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _cut(args: argparse.Namespace) -> str:
    parts = [f"{args.steps} steps a stage"] * bool(args.steps)
    parts += [f"{args.limit} questions"] * bool(args.limit)
    return ", ".join(parts)


def _shortened(plan: "Jobs", steps: int) -> "Jobs":
    def short(job: "Job") -> "Job":
        stages = (dataclasses.replace(s, steps=min(s.steps, steps)) for s in job.stages)
        return dataclasses.replace(job, stages=tuple(stages))

    return dataclasses.replace(plan, jobs={name: short(job) for name, job in plan.jobs.items()})


def _tell(plan: "Jobs", out: Path, args: argparse.Namespace) -> None:
    """The jobs in their order; at full scale as commands, which a cluster can run one by one."""
    for job in plan.jobs.values():
        state = "done" if job.is_done(out) else f"{job.steps} steps"
        print(f"# {job.name}: {state}" + (f", after {job.needs}" if job.needs else ""))
        if args.scale == "full":
            for words in _commands(job, out, args):
                print(shlex.join(words))


def _commands(job: "Job", out: Path, args: argparse.Namespace) -> list[list[str]]:
    train = ["python", "train.py", str(job.config), "--workdir", str(out / job.name)]
    for stage in job.stages:
        # A file of several stages has its fields by their names.
        of = f"{stage.name}." * (len(job.stages) > 1)
        own_start = [] if len(job.stages) > 1 else ["--start", stage.start]
        train += [*own_start, f"--{of}seed", str(stage.seed)]
        train += [f"--{of}steps", str(stage.steps)] * bool(args.steps)
    if not job.benchmarks:
        return [train]
    asked = ["--model", str(job.model(out)), "--benchmarks", ",".join(job.benchmarks)]
    asked += ["--data", str(args.data or DATA), "--out", str(job.results(out).parent)]
    asked += ["--limit", str(args.limit)] * bool(args.limit)
    return [train, ["python", "eval.py", *asked]]
