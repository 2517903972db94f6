"""Training: `python train.py CONFIG.py --workdir DIR [--FIELD VALUE ...]`.

A config file defines `config()`, which returns frozen dataclasses (training/stages.py). Every field
can be replaced on the command line; `python train.py CONFIG.py --help` lists them. A workdir that
holds checkpoints is continued. --dry-run tells what would be trained and what memory it takes;
--profile.steps 10:15 records those steps for xprof; --distributed joins the processes of a cluster,
on each of which the same command is started. A run that SIGTERM stops ends with --stopped-status,
0 unless given: clusters that start a failed command again need to be told another one.
--track.to wandb trackio tells these packages the metrics too, under --track.project NAME.
--accept-changed-data continues a run on other data than it began with. Compiled programs are kept
in the user's cache folder, or in --compilation-cache DIR ("none": nowhere); those of several
processes only in a DIR that all of them see.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

from llava_mini_jax import compilation, environment, signals
from llava_mini_jax.arguments import unboxed
from llava_mini_jax.errors import InputError, LostError, memory_sentence

MEMORY_ADVICE = (
    "try larger --STAGE.accumulate (smaller micro-batches), --STAGE.model.remat full, or more "
    "devices (--STAGE.mesh.fsdp); --dry-run tells what a stage takes, and the same command goes on "
    "from the last checkpoint"
)

STOPPED = "train.py: stopped; the same command continues from the last checkpoint"


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


def parse(default: Any, argv: list[str]) -> Command:
    """The config's own fields stand at the top level of the options, beside those of a run."""
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
    ]
    fields = [
        (f.name, f.type, dataclasses.field(default=getattr(default, f.name)))
        for f in dataclasses.fields(default)
    ]
    options = dataclasses.make_dataclass("Options", [*own, *fields], frozen=True)
    read = functools.partial(tyro.cli, options, config=(tyro.conf.AvoidSubcommands,))
    program, words = f"train.py {argv[0]}", argv[1:]
    if {"-h", "--help"} & set(words):
        read(args=words, prog=program)  # leaves
    with unboxed(program):
        chosen = read(args=words, prog=program)
    if not chosen.workdir and not chosen.dry_run:
        raise InputError("a run needs --workdir DIR, where it is kept and continued")
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
            dry_run.describe(chosen)
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
