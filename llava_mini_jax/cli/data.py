"""`llava-mini data verify | build | speed | packing`: what is done before a run depends on data.

data file | YAML list | training config --> SourcesConfig --audit--> manifest --> --report
                                                |            '--> counts and rejected samples
                                                '--build--> ArrayRecord folder --out
                            training config --> its batches --speed--> a table
                                            '-> what its samples need --packing--> a table
"""

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import JSON, Kind, refuse
from llava_mini_jax.cli import data_packing
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import print_json, watching

if TYPE_CHECKING:
    from llava_mini_jax.data.sets.sources import SourcesConfig

SUMMARY = "check a data set, build it into few files, measure reading speed, or plan packing"
USAGE = """llava-mini data verify SOURCE [options]
llava-mini data build SOURCE --out DIR [options]
llava-mini data speed CONFIG.py [options]
llava-mini data packing CONFIG.py [options]"""
EXAMPLE = """examples:
  llava-mini data verify captions.json --images coco --report manifest.json
  llava-mini data verify mixture.yaml --images images --workers 8
  llava-mini data build captions.json --images coco --out captions
  llava-mini data speed configs/digits.py --threads 1 2
  llava-mini data packing my_config.py --images 8 12 16

exit status: 0 all samples are good, 1 some are rejected, 2 the source cannot be opened"""

SHOWN = 20  # rejected samples on the terminal; the report has them all
FPS, MAX_FRAMES = 1.0, 1024


def _of_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="data file (.json, .jsonl, .parquet, .tar; on disk or a URL), folder (of .parquet,"
        " saved by `datasets`, or built), a .yaml list of them, or a training config (.py)",
    )
    add(
        "--images",
        metavar="DIR",
        help="folder, URL or .tar shards that image paths are relative to",
    )
    add("--workers", type=int, metavar="N", help="threads (default: one for each core)")
    add("--fps", type=float, metavar="F", help=f"video frames to read a second (default: {FPS:g})")
    add("--max-frames", type=int, metavar="N", help=f"most frames a video (default: {MAX_FRAMES})")


def _of_verify(parser: argparse.ArgumentParser) -> None:
    _of_source(parser)
    parser.add_argument("--report", metavar="OUT.json", help="file for the manifest")
    parser.add_argument("--json", action="store_true", help=JSON)


def _of_build(parser: argparse.ArgumentParser) -> None:
    _of_source(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="the new folder")
    add("--shards", type=int, metavar="N", help="files a data set (default: one per 4096 samples)")
    add(
        "--skip-rejected",
        action="store_true",
        help="leave broken samples out and list them in DIR/rejected.jsonl",
    )


def _of_speed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="CONFIG.py", help="a training config")
    add("--batches", type=int, default=20, metavar="N", help="batches to time (default: 20)")
    add(
        "--threads",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of threads to compare (default: 1, and one for each core)",
    )
    add("--json", action="store_true", help=JSON)


def _verify(args: argparse.Namespace) -> int:
    from llava_mini_jax.data.sets import audit

    configs = list(_configs(args, heldout=True))
    report = None if args.report is None else audit.check_writable(args.report, configs)
    manifests = []
    for config in configs:
        with watching("samples") as progress:
            manifests.append(audit.audit(config, workers=_workers(args), progress=progress))
    manifest = manifests[0] if len(manifests) == 1 else {"stages": manifests}
    if report is not None:
        audit.write_manifest(manifest, report)
    if args.json:
        print_json(manifest)
    for one in () if args.json else manifests:
        for dataset in one["datasets"]:
            kinds = ", ".join(f"{count} {name}" for name, count in dataset["modalities"].items())
            print(f"{dataset['name']}: {kinds}, {dataset['rejected']} rejected")
        _print_rejected(one["rejected"], "--report OUT.json lists them all")
    return int(any(one["rejected"] for one in manifests))


def _build(args: argparse.Namespace) -> int:
    from llava_mini_jax.data.sets.build import LIST, build

    if args.out is None:
        raise InputError("data build needs --out DIR, a folder that does not exist yet")
    configs = list(_configs(args, heldout=False))
    if len(configs) > 1:
        raise InputError(
            f"the stages of {args.source} have {len(configs)} different data: build each data set"
            " or list separately"
        )
    as_list = Path(args.source).suffix.lower() in (".yaml", ".yml", ".py")
    with watching("samples") as progress:
        built = build(
            configs[0],
            args.out,
            as_list=as_list,
            shards=args.shards,
            workers=_workers(args),
            skip_rejected=args.skip_rejected,
            progress=progress,
        )
    whole = not built.rejected or args.skip_rejected
    for name, count in built.samples.items() if whole else ():
        print(f"{name}: {count} samples")
    if built.rejected:
        _print_rejected(built.rejected, f"{args.out}/rejected.jsonl lists them" if whole else "")
    if not whole:
        print(
            f"{len(built.rejected)} samples are rejected, nothing was built: correct or remove them"
            " (llava-mini data verify --report OUT.json lists all), or give --skip-rejected"
        )
        return 1
    print(f"use {args.out}{f'/{LIST}' if as_list else ''} as the data of a training config")
    return 0


def _speed(args: argparse.Namespace) -> int:
    from llava_mini_jax.data.batches.speed import measure
    from llava_mini_jax.training import feed
    from llava_mini_jax.training.run_inputs import make_tokenizer
    from llava_mini_jax.training.stages import load_config, stages_of

    if Path(args.source).suffix != ".py":
        raise InputError(f"data speed measures a training config (.py), not {args.source}")
    show = (lambda *_: None) if args.json else print
    show(f"{'stage':<12} {'threads':>7} {'samples/s':>9} {'s a batch':>9} {'core ms a sample':>16}")
    rows = []
    for stage in stages_of(load_config(args.source)):
        source = feed.open_data(stage.data)
        tokenizer = make_tokenizer(stage)
        stream = functools.partial(
            feed.batches, stage, source, tokenizer, rows=stage.batch_size, first_step=0
        )
        for threads in args.threads or sorted({1, os.cpu_count() or 1}):
            speed = measure(stream, threads, args.batches)
            rows.append({"stage": stage.name} | speed._asdict())
            show(
                f"{stage.name:<12} {threads:7} {speed.samples:9.1f} {1 / speed.batches:9.4g}"
                f" {1000 * speed.cpu:16.3g}"
            )
    if args.json:
        print_json(rows)
    return 0


def _workers(args: argparse.Namespace) -> int:
    return os.cpu_count() or 1 if args.workers is None else args.workers


def _configs(args: argparse.Namespace, *, heldout: bool) -> "Iterator[SourcesConfig]":
    from llava_mini_jax.data.media.video import FrameSampling
    from llava_mini_jax.data.sets.row_files import is_built
    from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
    from llava_mini_jax.data.sets.yaml_list import read_list

    suffix = Path(args.source).suffix.lower()
    if suffix == ".py":
        refuse(args, ["images", "fps", "max_frames"], "for a config, which says it by itself")
        yield from _of_training(args.source, heldout)
        return
    if is_built(args.source):
        refuse(args, ["images"], "for a built folder, which has its own inside")
    images = args.images or ""
    if suffix in (".yaml", ".yml"):
        datasets = read_list(args.source, images)
    else:
        datasets = (Dataset(path=args.source, images=images),)
    yield SourcesConfig(
        datasets=datasets,
        video=FrameSampling(
            fps=FPS if args.fps is None else args.fps,
            max_frames=MAX_FRAMES if args.max_frames is None else args.max_frames,
        ),
    )


def _of_training(path: str, heldout: bool) -> "list[SourcesConfig]":
    """The different data of a config file's stages, as train.py reads it."""
    from llava_mini_jax.data.sets.sources import SourcesConfig
    from llava_mini_jax.training.stages import load_config, stages_of

    stages = stages_of(load_config(path))
    data = [stage.data for stage in stages]
    data += [stage.heldout.data for stage in stages if heldout and stage.heldout is not None]
    found = list(dict.fromkeys(d for d in data if isinstance(d, SourcesConfig)))
    if not found:
        raise InputError(f"no stage of {path} has data files; there is nothing to verify")
    return found


def _print_rejected(rejected: list[dict[str, Any]], where: str) -> None:
    for sample in rejected[:SHOWN]:
        # Ids and reasons may hold half a character, which no terminal can write.
        print(f"  {sample['id']!a:.60}: {sample['reason'].encode(errors='replace').decode()}")
    if len(rejected) > SHOWN:
        print(f"  and {len(rejected) - SHOWN} more{where and '; '}{where}")


KINDS = {
    "verify": Kind("read and check every sample", _of_verify, _verify),
    "build": Kind("pack samples and their media into ArrayRecord files", _of_build, _build),
    "speed": Kind("measure the samples a second of a training config", _of_speed, _speed),
    "packing": Kind(
        "predict what packing conversations into rows gains",
        data_packing.add_arguments,
        data_packing.run,
    ),
}
