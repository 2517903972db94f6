"""`llava-mini analyze`: what happens inside a model, as tables and images.

MODEL, --data --> attention: who attends to whom in each layer (figures 2, 3, 4 of the paper)
MODEL, --image, --video --> compression: what each query looks at in the images (figure 12)
MODEL, --benchmark --> drop: its score when some layers do not see the image (figure 5)
MODEL, --benchmark --> counts: whether choosing the vision tokens of each question pays
                       each: a table to stdout, JSON and PNG files to --out
OUT of eval.py --> needle: accuracy over frames, of all models in one PNG and one CSV file
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import VISION_TOWER, Kind, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import loading, waiting

if TYPE_CHECKING:
    from llava_mini_jax.analysis.attention import AttentionByLayer
    from llava_mini_jax.inference.model import Model

FRAMES = 8  # of a video that are drawn

SUMMARY = "show attention by layer, what the compressor attends to, and what masked layers cost"
USAGE = """llava-mini analyze attention MODEL [--data FILE] [options]
llava-mini analyze compression MODEL --image FILE... --video FILE... [options]
llava-mini analyze drop MODEL [--benchmark NAME] [options]
llava-mini analyze counts MODEL [--benchmark NAME] [options]
llava-mini analyze needle OUT"""
EXAMPLE = """examples:
  llava-mini analyze attention MODEL --data digits --out out/analyze
  llava-mini analyze attention MODEL --data llava.json --images coco --limit 200
  llava-mini analyze compression MODEL --image cat.jpg --video clip.mp4 --out out/analyze
  llava-mini analyze drop MODEL --benchmark digits --width 1
  llava-mini analyze counts MODEL --benchmark digits
  llava-mini analyze needle out/eval"""


def _of_model(parser: argparse.ArgumentParser, *, plots: bool = True) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add("--out", type=Path, default=Path("out/analyze"), metavar="DIR", help="default: out/analyze")
    if plots:
        add(
            "--no-plots",
            action="store_true",
            help="skip the plots, which need matplotlib (extra plots)",
        )
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16; int8 or int4 weights")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)


def _of_attention(parser: argparse.ArgumentParser) -> None:
    _of_model(parser)
    add = parser.add_argument
    add("--data", metavar="FILE", help="digits, or LLaVA's JSON (default: digits)")
    add("--images", metavar="DIR", help="folder that image paths are relative to")
    add("--limit", type=int, default=100, metavar="N", help="samples to use (default: 100)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows a batch (default: 4)")


def _of_compression(parser: argparse.ArgumentParser) -> None:
    _of_model(parser)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="an image; repeatable")
    add("--video", action="append", default=[], metavar="FILE", help="a video; repeatable")
    add("--queries", type=int, default=4, metavar="N", help="queries to draw (default: 4)")
    add("--frames", type=int, metavar="N", help=f"frames to draw of a video (default: {FRAMES})")


def _of_drop(parser: argparse.ArgumentParser) -> None:
    _of_model(parser)
    add = parser.add_argument
    add("--benchmark", default="digits", metavar="NAME", help="one of eval.py's (default: digits)")
    add("--data", metavar="DIR", help="folder of the benchmarks' files, as for eval.py")
    add("--limit", type=int, default=100, metavar="N", help="questions to ask (default: 100)")
    add("--width", type=int, default=4, metavar="W", help="layers to mask at a time (default: 4)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows a batch (default: 4)")


def _of_counts(parser: argparse.ArgumentParser) -> None:
    _of_model(parser, plots=False)
    add = parser.add_argument
    add("--benchmark", default="digits", metavar="NAME", help="one of eval.py's (default: digits)")
    add("--data", metavar="DIR", help="folder of the benchmarks' files, as for eval.py")
    add("--limit", type=int, default=1000, metavar="N", help="questions to ask (default: 1000)")
    add("--batch-size", type=int, default=8, metavar="N", help="rows a batch (default: 8)")


def _of_needle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the --out of the eval.py run")


def _open(args: argparse.Namespace) -> "Model":
    """The model, once everything else is known to be usable."""
    for name in ("limit", "batch_size", "queries", "frames", "width"):
        if (number := getattr(args, name, None)) is not None and number < 1:
            raise InputError(f"--{name.replace('_', '-')} is {number}; give 1 or more")
    if not getattr(args, "no_plots", True):
        from llava_mini_jax.analysis import figures

        figures.pyplot()  # before anything takes long
    import llava_mini_jax

    with loading(args.model) as watch:
        model = llava_mini_jax.load(
            args.model, dtype=args.dtype, vision_tower=args.vision_tower, watch=watch
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be made ({error}); give another") from error
    return model


# --------------------------------------------------------------------------------------- attention


def _attention(args: argparse.Namespace) -> int:
    from llava_mini_jax.analysis import attention, figures, samples
    from llava_mini_jax.data.sets.arrayrecord import INFO

    name = args.data or samples.DIGITS
    if name == samples.DIGITS:
        refuse(args, ["images"], "with --data digits")
    if (Path(name) / INFO).exists():
        refuse(args, ["images"], "for a built folder, which has its own inside")
    model = _open(args)
    source = samples.open_source(name, args.images or "", args.limit)
    examples = samples.Examples(source, model.bundle, model.tokenizer, args.limit)
    try:
        with waiting(f"reading {min(args.limit, len(source))} samples of {name}"):
            found = attention.by_layer(
                model.params, model.bundle, examples, batch_size=args.batch_size
            )
    finally:
        if examples.left_out:
            print(
                f"llava-mini: {len(examples.left_out)} samples are left out, such as:"
                f" {examples.left_out[0]}",
                file=sys.stderr,
            )
    _print_attention(found)
    result = {"model": args.model, "data": name, **attention.as_json(found)}
    written = [_write(args.out / "attention.json", result)]
    if not args.no_plots:
        written.append(figures.attention(found, args.out / "attention.png"))
        written.append(figures.entropy(found, args.out / "entropy.png"))
        written.append(figures.maps(found, args.out / "maps.png"))
    print("written:", *written)
    return 0


def _print_attention(found: "AttentionByLayer") -> None:
    from llava_mini_jax.analysis.attention import KINDS

    counts = ", ".join(f"{n:,.0f} {kind}" for n, kind in zip(found.tokens_J, KINDS, strict=True))
    print(f"{found.examples} examples; tokens: {counts}")
    print("mean share of attention; in brackets entropy / log n: 1 if attention is even")
    for j, asking in enumerate(KINDS):
        if not found.tokens_J[j]:
            continue
        print(f"\nfrom {asking:<14}" + "".join(f"{'to ' + kind:>18}" for kind in KINDS))
        for layer, (share_K, even_K) in enumerate(
            zip(found.attention_LJK[:, j], found.evenness_LJK[:, j], strict=True)
        ):
            cells = [
                f"{share:.3f} " + ("(-)" if math.isnan(even) else f"({even:.2f})")
                for share, even in zip(share_K, even_K, strict=True)
            ]
            print(f"  layer {layer + 1:<11}" + "".join(f"{cell:>18}" for cell in cells))
    print()


# ------------------------------------------------------------------------------------- compression


def _compression(args: argparse.Namespace) -> int:
    import numpy as np

    from llava_mini_jax.analysis import compression, figures

    if not (args.image or args.video):
        raise InputError("no image is given; add --image FILE or --video FILE")
    if not args.video:
        refuse(args, ["frames"], "without --video")
    model = _open(args)
    pictures = model.read_pictures(args.image, args.video)
    files = [*args.image, *args.video]
    names = [
        Path(file).name if count == 1 else f"{Path(file).name}, frame {frame + 1}"
        for file, count in zip(files, pictures.frames, strict=True)
        for frame in range(count)
    ]
    ends = np.cumsum([0, *pictures.frames])
    chosen = [i for a, b in itertools.pairwise(ends) for i in _some(a, b, args.frames or FRAMES)]
    names, pixels = [names[i] for i in chosen], pictures.pixels[chosen]
    cfg = model.bundle.model
    with waiting("compressing"):
        maps_IQYX = compression.maps(model.params, pixels, cfg)
    width = max(map(len, names))
    print(f"{'image':<{width}}  evenness (1: average pooling, 0: a single patch), of the queries")
    rows = []
    for name, found_QYX in zip(names, maps_IQYX, strict=True):
        even = [compression.evenness(map_YX) for map_YX in found_QYX]
        mean = compression.evenness(found_QYX.mean(axis=0))
        shown = "  ".join(f"{value:.3f}" for value in even[: args.queries])
        print(f"{name:<{width}}  {shown}" + (f"  of their mean {mean:.3f}" if even[1:] else ""))
        rows.append({"picture": name, "evenness": even, "map": found_QYX.tolist()})
    note = compression.position_note(cfg)
    if note:
        print(note)
    result = {"model": args.model, "note": note, "pictures": rows}
    written = [_write(args.out / "compression.json", result)]
    if not args.no_plots:
        seen = [compression.assembled(parts) for parts in pixels]
        path = args.out / "compression.png"
        figures.compression(seen, list(maps_IQYX), names, path, queries=args.queries)
        written.append(path)
    print("written:", *written)
    return 0


# -------------------------------------------------------------------------------------------- drop


def _drop(args: argparse.Namespace) -> int:
    from llava_mini_jax.analysis import drop, figures
    from llava_mini_jax.evaluation.benchmark import find

    benchmark = find(args.benchmark)
    if not benchmark.files:
        refuse(args, ["data"], f"with --benchmark {benchmark.name}, which has no files")
    model = _open(args)
    chosen = drop.ranges(model.bundle.model.llm.layers, args.width)
    data = Path(args.data or ".") / benchmark.folder
    questions = benchmark.questions(data)[: args.limit]
    out = args.out / f"drop-{benchmark.name}"
    with waiting(f"asking {len(questions)} questions {len(chosen)} times"):
        scores = drop.scores(
            model,
            args.model,
            benchmark,
            data,
            questions,
            chosen,
            out,
            batch_size=args.batch_size,
        )
    print(f"{benchmark.title}, {benchmark.metric}; {len(questions)} questions")
    print("layers in which text does not see vision tokens:")
    for name, value in scores.items():
        print(f"  {name:<8}{value:8.1f}")
    result = {
        "model": args.model,
        "benchmark": benchmark.name,
        "metric": benchmark.metric,
        "questions": len(questions),
        "scores": scores,
    }
    written = [_write(args.out / "drop.json", result)]
    if not args.no_plots:
        title = f"{benchmark.title}, {len(questions)} questions"
        written.append(figures.drop(scores, title, benchmark.metric, args.out / "drop.png"))
    print("written:", *written)
    return 0


# ---------------------------------------------------------------------------------------- counts


def _counts(args: argparse.Namespace) -> int:
    from llava_mini_jax.analysis import counts
    from llava_mini_jax.evaluation.benchmark import find

    benchmark = find(args.benchmark)
    if not benchmark.files:
        refuse(args, ["data"], f"with --benchmark {benchmark.name}, which has no files")
    model = _open(args)
    questions = benchmark.questions(Path(args.data or ".") / benchmark.folder)[: args.limit]
    with waiting(f"asking {len(questions)} questions with each number of vision tokens"):
        measured = counts.measure(model, benchmark, questions, batch_size=args.batch_size)
    verdicts = counts.judge(measured)
    print(f"{benchmark.title}, {len(questions)} questions")
    print(*counts.lines(measured, verdicts), sep="\n")
    about = {"model": args.model, "benchmark": benchmark.name, "questions": len(questions)}
    result = about | counts.as_json(measured, verdicts)
    print("written:", _write(args.out / "counts.json", result))
    return 0


def _some(first: int, end: int, most: int) -> list[int]:
    """At most `most` of the numbers from `first` to `end` - 1, evenly spread."""
    count = min(most, end - first)
    return [int(first + i * (end - first) // count) for i in range(count)]


def _write(path: Path, result: dict[str, Any]) -> Path:
    from llava_mini_jax.terminal import as_json

    path.write_text(as_json(result, indent=1) + "\n")
    return path


def _needle(args: argparse.Namespace) -> int:
    from llava_mini_jax.evaluation.video.needle import compare

    print("written:", *compare(args.out))
    return 0


KINDS = {
    "attention": Kind("plot which tokens attend to which", _of_attention, _attention),
    "compression": Kind("draw what the compressor attends to", _of_compression, _compression),
    "drop": Kind("measure a benchmark with vision masked in some layers", _of_drop, _drop),
    "counts": Kind("test rules that choose vision tokens by question", _of_counts, _counts),
    "needle": Kind("draw the needle curves of all models of an eval.py run", _of_needle, _needle),
}
