"""Training: `python train.py CONFIG.py --workdir DIR [--FIELD VALUE ...]`.

A config file defines `config()`, which returns frozen dataclasses (training/stages.py). You can
override every field on the command line; `python train.py CONFIG.py --help` lists them. The same
command resumes a workdir that holds checkpoints.

  --dry-run              print what would be trained and the memory that it needs, then stop
  --dry-run-images N     ... for rows of N images or frames each, not one
  --profile.steps 10:15  record these steps of every stage for xprof
  --track.to wandb       also log metrics to wandb or trackio, in the project --track.project NAME
  --distributed          join the processes of a cluster, each of which runs the same command
  --stopped-status N     exit status after SIGTERM, 0 by default; clusters that restart failed
                         commands need another one
  --accept-changed-data  resume although the data differ from those that the run began with
  --compilation-cache DIR
                         folder for compiled programs, or "none" (default: the user's cache folder);
                         several processes need a DIR that all of them see
"""

import dataclasses
import functools
import sys
from typing import Annotated, Any, NamedTuple

from llava_mini_jax import compilation, environment, signals
from llava_mini_jax.arguments import comments, unboxed
from llava_mini_jax.errors import InputError, LostError, memory_sentence

MEMORY_ADVICE = (
    "try larger --STAGE.accumulate (smaller micro-batches), --STAGE.model.remat full, or more "
    "devices (--STAGE.mesh.fsdp); --dry-run prints what a stage needs. The same command resumes "
    "from the last checkpoint"
)

STOPPED = "train.py: stopped; the same command continues from the last checkpoint"


HELP = {
    "workdir": "folder of the run; a folder with checkpoints is resumed",
    "dry_run": "print what would be trained and the memory that it needs, then stop",
    "dry_run_images": "of --dry-run: images or frames of a row",
    "distributed": "join the processes of a cluster, each of which runs the same command",
    "stopped_status": "exit status after SIGTERM",
    "accept_changed_data": "resume although the data differ from those that the run began with",
    "compilation_cache": compilation.HELP,
}


class Command(NamedTuple):
    config: Any
    workdir: str
    dry_run: bool
    distributed: bool
    stopped_status: int
    profile: Any
    accept_changed_data: bool = False
    compilation_cache: str | None = None
    track: Any = None
    dry_run_images: int | None = None


def parse(default: Any, argv: list[str]) -> Command:
    """The fields of the config are top-level options, like those of a run."""
    import tyro

    from llava_mini_jax.training.trackers import TrackConfig
    from llava_mini_jax.training.xprof import ProfileConfig

    own = [
        ("workdir", str, ""),
        ("dry_run", bool, False),
        ("distributed", bool, False),
        ("stopped_status", int, 0),
        ("profile", ProfileConfig, ProfileConfig()),
        ("accept_changed_data", bool, False),
        ("compilation_cache", str | None, None),
        ("track", TrackConfig, TrackConfig()),
        ("dry_run_images", int | None, None),
    ]
    fields = [(f.name, f.type, getattr(default, f.name)) for f in dataclasses.fields(default)]
    about = HELP | comments(type(default))
    options = dataclasses.make_dataclass(
        "Options",
        [
            # tyro finds no comments here, because the class has no source of its own.
            (
                name,
                Annotated[kind, tyro.conf.arg(help=about.get(name) or None)],
                dataclasses.field(default=v),
            )
            for name, kind, v in (*own, *fields)
        ],
        frozen=True,
    )
    read = functools.partial(tyro.cli, options, config=(tyro.conf.AvoidSubcommands,))
    program, words = f"train.py {argv[0]}", argv[1:]
    if {"-h", "--help"} & set(words):
        read(args=words, prog=program)  # leaves
    with unboxed(program):
        chosen = read(args=words, prog=program)
    if not chosen.workdir and not chosen.dry_run:
        raise InputError("a run needs --workdir DIR, which keeps its checkpoints")
    if chosen.dry_run_images is not None and not chosen.dry_run:
        raise InputError("--dry-run-images belongs to --dry-run: a run counts the images itself")
    config = type(default)(**{name: getattr(chosen, name) for name, *_ in fields})
    return Command(config, *(getattr(chosen, name) for name, *_ in own))


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if not argv or argv[0].startswith("-"):
            raise InputError("no config file is given; see: train.py --help")
        environment.check(devices=False)
        import jax

        from llava_mini_jax import distributed
        from llava_mini_jax.training import dry_run, loop, stages

        default = stages.load_config(argv[0])
        stages.stages_of(default)
        command, status = parse(default, argv), 0
        chosen = stages.stages_of(command.config)
        if command.dry_run:
            dry_run.describe(chosen, command.dry_run_images)
        else:
            if command.distributed:
                distributed.start()
            else:
                environment.check_devices()
            compilation.keep_programs(
                command.compilation_cache, "train.py", processes=jax.process_count()
            )
            try:
                loop.run(
                    chosen,
                    command.workdir,
                    command.profile,
                    command.accept_changed_data,
                    command.track,
                )
            except loop.Stopped as stopped:
                print(f"train.py: {stopped}; the same command continues there")
                status = command.stopped_status
            if command.distributed:
                distributed.stop()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except LostError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (sentence := memory_sentence(error, MEMORY_ADVICE)) is None:
            raise
        print(f"train.py: {sentence}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(STOPPED)
        return 130
    return status


if __name__ == "__main__":
    signals.run(lambda: main(sys.argv[1:]), STOPPED)
