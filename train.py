"""Training: `python train.py CONFIG.py --workdir DIR [--FIELD VALUE ...]`.

A config file defines `config()`, which returns frozen dataclasses (training/stages.py). Every field
can be replaced on the command line; `python train.py CONFIG.py --help` lists them. A workdir that
holds checkpoints is continued.
"""

import dataclasses
import sys
from typing import Any

from llava_mini_jax.errors import InputError


def parse(default: Any, argv: list[str]) -> tuple[Any, str, bool]:
    """(config, workdir, dry_run): the config's own fields stand at the top level of the options."""
    import tyro

    fields = [
        (f.name, f.type, dataclasses.field(default=getattr(default, f.name)))
        for f in dataclasses.fields(default)
    ]
    options = dataclasses.make_dataclass(
        "Options", [("workdir", str), ("dry_run", bool, False), *fields], frozen=True
    )
    chosen = tyro.cli(
        options,
        args=argv[1:],
        prog=f"train.py {argv[0]}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = type(default)(**{name: getattr(chosen, name) for name, *_ in fields})
    return config, chosen.workdir, chosen.dry_run


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        from llava_mini_jax.training import describe, loop, stages

        default = stages.load_config(argv[0])
        stages.stages_of(default)
        config, workdir, dry_run = parse(default, argv)
        chosen = stages.stages_of(config)
        if dry_run:
            describe.describe(chosen)
        else:
            try:
                loop.run(chosen, workdir)
            except loop.Stopped as stopped:
                print(f"train.py: {stopped}; the same command continues there")
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the same command continues from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
