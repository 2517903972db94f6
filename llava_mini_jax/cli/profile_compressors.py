"""`llava-mini profile compressors`: every method beside the others, by image and by question."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import BACKBONES_HELP, JSON, Kind, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import columns, human_bytes, print_json, waiting, watching

if TYPE_CHECKING:
    from llava_mini_jax.cost.methods import Cost
    from llava_mini_jax.models.llava_mini import LlavaMiniConfig

USAGE = "llava-mini profile compressors [METHOD ...] [--abstract NAME] [options]"
EXAMPLE = "llava-mini profile compressors LLaVA-Mini VoCo FastV --text 43"
TEXT = 43  # as the other profiles
MEASURED = "ms: a session's first tokens, everything counted; - where there is none."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("methods", nargs="*", metavar="METHOD", help="methods to show (default: all)")
    add("--abstract", metavar="NAME", default="vicuna-7b", help=BACKBONES_HELP)
    add("--text", type=int, default=TEXT, metavar="T", help=f"question tokens (default: {TEXT})")
    add("--json", action="store_true", help=JSON)
    add = parser.add_argument_group("latency, with random weights").add_argument
    add("--latency", action="store_true", help="measure a session's first tokens")
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16")
    add("--llm-layers", type=int, metavar="N", help="layers of the language model (default: all)")
    add("--repeats", type=int, metavar="N", help="repetitions (default: 5)")


def run(args: argparse.Namespace) -> int:
    for option in ("text", "llm_layers", "repeats"):
        given = getattr(args, option)
        if given is not None and given < 1:
            raise InputError(f"--{option.replace('_', '-')} is {given}; give 1 or more")
    if not args.latency:
        refuse(args, ["dtype", "llm_layers", "repeats"], "without --latency")
    models = _models(args)
    with waiting("counting"):
        costs = {name: _cost(name, cfg, args.text) for name, cfg in models.items()}
    times = _times(models, args) if args.latency else {}
    if args.json:
        found = {name: dataclasses.asdict(each) for name, each in costs.items()}
        for name, (first, turn) in times.items():
            found[name]["first_ms"], found[name]["turn_ms"] = first.median, turn.median
        print_json({"text": args.text, "methods": found})
    else:
        print(*lines(costs, times, args.text), sep="\n")
    return 0


def _cost(name: str, cfg: "LlavaMiniConfig", text: int) -> "Cost":
    from llava_mini_jax.cost import methods

    try:
        return methods.cost(cfg, text)
    except ValueError as error:  # a question that a method has no positions for
        raise InputError(f"--text {text}, method {name}: {error}") from None


def _models(args: argparse.Namespace) -> "dict[str, LlavaMiniConfig]":
    from llava_mini_jax.config import CLIP_L_336, backbone
    from llava_mini_jax.cost import methods

    llm = backbone(args.abstract)
    found = methods.full_size(
        CLIP_L_336, dataclasses.replace(llm, layers=args.llm_layers or llm.layers)
    )
    for name in args.methods:
        if name not in found:
            raise InputError(f'method "{name}" is unknown; give one of {", ".join(found)}')
    return {name: found[name] for name in args.methods or found}


def _times(models: "dict[str, LlavaMiniConfig]", args: argparse.Namespace) -> dict[str, Any]:
    """(first question, next one) in milliseconds, of those that sessions take."""
    from llava_mini_jax.cost import follow_up
    from llava_mini_jax.cost import latency as timing
    from llava_mini_jax.inference.opening import computing_dtype

    dtype = computing_dtype(args.dtype)
    taken = {
        name: dataclasses.replace(cfg, compute_dtype=dtype)
        for name, cfg in models.items()
        if cfg.keeps_cache and not cfg.declared.reads.question
    }
    if not taken:
        return {}
    request = timing.Request(text=args.text, images=1, parts=1, new_tokens=1)
    with watching("measuring", stays=False) as watch:
        candidates = timing.random_candidates(taken, dtype)
        runs = {
            name: follow_up.runner(timing.askable(model), request)
            for name, model in candidates.items()
        }
        found = timing.in_turns(runs, args.repeats or 5, watch)
    return {name: [timing.spread(each) for each in found[name]] for name in found}


def lines(costs: "dict[str, Cost]", times: dict[str, Any], text: int) -> list[str]:
    header = ["", "tokens", "kept", "a turn", "image", "first", "next", "cache", "pre-fusion"]
    rows = [header + (["first", "next"] if times else [])]
    for name, each in costs.items():
        tera = (each.picture_flops, each.first_flops, each.turn_flops)
        row = [name, str(each.tokens), str(each.last or "-"), str(each.again)]
        row += [f"{flops / 1e12:.3f} T" for flops in tera]
        row += [
            human_bytes(size) if size else "-" for size in (each.cache_bytes, each.fusion_bytes)
        ]
        if times:
            row += [f"{t.median:.0f} ms" for t in times[name]] if name in times else ["-", "-"]
        rows.append(row)
    return [
        f"one image, questions of {text} tokens; FLOPs of a first token",
        "",
        *columns(rows),
        "",
        "tokens: of an image, at most, before the language model; kept: in its last layer's",
        "  cache. a turn: of these, those that each further question reads again.",
        "image: FLOPs that no question changes. first, next: a question about a new image, the",
        "  one behind it. cache, pre-fusion: bytes that an image leaves for the next question.",
        *([MEASURED] if times else []),
    ]


KIND = Kind("tokens and FLOPs of every compressor, by image and by question", add_arguments, run)
