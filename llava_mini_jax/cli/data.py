"""`llava-mini data verify`: every sample read once before a run depends on it.

data file | YAML list | training config --> SourcesConfig --audit--> manifest --> --report
                                                              '--> counts and rejected samples
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.errors import InputError

if TYPE_CHECKING:
    from llava_mini_jax.data.sources import SourcesConfig

SUMMARY = "read and check every sample of a data set"
USAGE = "llava-mini data verify SOURCE [options]"
EXAMPLE = """examples:
  llava-mini data verify captions.json --images coco --report manifest.json
  llava-mini data verify mixture.yaml --images pictures --workers 8

exit status: 0 all samples are good, 1 some are rejected, 2 the source cannot be opened"""

SHOWN = 20  # rejected samples on the terminal; the report has them all
FPS, MAX_FRAMES = 1.0, 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=["verify"], metavar="verify", help="decode every sample once")
    add(
        "source",
        metavar="SOURCE",
        help="data file (.json, .jsonl, .parquet, folder of .parquet), a .yaml list of them, or a"
        " training config (.py)",
    )
    add("--images", metavar="DIR", help="folder that the paths of pictures are relative to")
    add("--report", metavar="OUT.json", help="write the manifest there")
    add("--workers", type=int, metavar="N", help="threads (default: one for each core)")
    add("--fps", type=float, metavar="F", help=f"frames a second of videos (default: {FPS:g})")
    add("--max-frames", type=int, metavar="N", help=f"of one video (default: {MAX_FRAMES})")


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax.data import audit

    configs = list(_configs(args))
    report = None if args.report is None else audit.check_writable(args.report, configs)
    workers = os.cpu_count() or 1 if args.workers is None else args.workers
    manifests = []
    for config in configs:
        with _progress() as progress:
            manifests.append(audit.audit(config, workers=workers, progress=progress))
    manifest = manifests[0] if len(manifests) == 1 else {"stages": manifests}
    if report is not None:
        audit.write_manifest(manifest, report)
    for one in manifests:
        print(*_lines(one), sep="\n")
    return int(any(one["rejected"] for one in manifests))


def _configs(args: argparse.Namespace) -> "Iterator[SourcesConfig]":
    from llava_mini_jax.data.sources import Dataset, SourcesConfig, read_list

    suffix = Path(args.source).suffix.lower()
    options = {"--images": args.images, "--fps": args.fps, "--max-frames": args.max_frames}
    if suffix == ".py":
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise InputError(f"{', '.join(given)} is for data files; a config says it by itself")
        yield from _of_training(args.source)
        return
    images = args.images or ""
    if suffix in (".yaml", ".yml"):
        datasets = read_list(args.source, images)
    else:
        datasets = (Dataset(path=args.source, images=images),)
    yield SourcesConfig(
        datasets=datasets,
        fps=FPS if args.fps is None else args.fps,
        max_frames=MAX_FRAMES if args.max_frames is None else args.max_frames,
    )


def _of_training(path: str) -> "list[SourcesConfig]":
    """The different data of a config file's stages, as train.py reads it."""
    from llava_mini_jax.data.sources import SourcesConfig
    from llava_mini_jax.training.stages import load_config, stages_of

    data = [stage.data for stage in stages_of(load_config(path))]
    found = list(dict.fromkeys(d for d in data if isinstance(d, SourcesConfig)))
    if not found:
        raise InputError(f"no stage of {path} has data files; there is nothing to verify")
    return found


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr if it is a terminal."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.MofNCompleteColumn(),
        bars.TextColumn("samples"),
        bars.BarColumn(),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(manifest: dict[str, Any]) -> Iterator[str]:
    for dataset in manifest["datasets"]:
        kinds = ", ".join(f"{count} {name}" for name, count in dataset["modalities"].items())
        yield f"{dataset['name']}: {kinds}, {dataset['rejected']} rejected"
    rejected = manifest["rejected"]
    for sample in rejected[:SHOWN]:
        yield f"  {sample['id']!a:.60}: {sample['reason'].encode(errors='replace').decode()}"
    if len(rejected) > SHOWN:
        yield f"  and {len(rejected) - SHOWN} more; --report OUT.json lists them all"
