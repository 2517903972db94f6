"""What `llava-mini profile` finds out: a dictionary for --json, and tables without it.

Imported only when a profile is taken: unlike the command's options, it needs JAX.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax.arguments import refuse
from llava_mini_jax.cli import profile_tables
from llava_mini_jax.config import NARROW_DTYPES, VICUNA_7B, backbone
from llava_mini_jax.cost import flops as flops_of
from llava_mini_jax.cost import flops_table, follow_up, inference_memory, machine, paper_figures
from llava_mini_jax.cost import latency as timing
from llava_mini_jax.cost.baseline import llava_1_5, shared_params
from llava_mini_jax.cost.latency import Candidate, Request
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.model import load
from llava_mini_jax.inference.opening import computing_dtype
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.terminal import loading, waiting, watching
from llava_mini_jax.weights import folders, hub

BASELINE = "LLaVA-1.5"
FOLLOW_UP = ", in a session"
NEW_TOKENS = 32  # of an answer


# ------------------------------------------------------------------------------------------- FLOPs


def flops(args: argparse.Namespace) -> dict[str, Any]:
    text, chosen = paper_figures.TEXT if args.text is None else args.text, _settings(args)
    if text < 1:
        raise InputError(f"--text is {text}; give 1 or more")
    if args.model:
        cfg, side = _shape(args, "bfloat16")
        resolutions = args.resolution or [side]
        entries = [e for side in resolutions for e in flops_table.of_model(cfg, text, side)]
    else:
        rows = paper_figures.rows(*chosen) if chosen else paper_figures.ROWS
        entries = flops_table.of_rows(rows, backbone(args.abstract or "vicuna-7b"), text)
    found = [(entry, flops_table.measure(entry, with_xla=args.xla)) for entry in entries]
    notes = []
    if any(entry.paper for entry in entries):
        length, agree, count = paper_figures.shared_length(paper_figures.ROWS, VICUNA_7B)
        notes = [
            f"Text length: {length} tokens give {agree} of the {count} printed totals by the"
            " paper's rule, and no other length any of these.",
            *paper_figures.CONTRADICTIONS,
        ]
    if not args.json:
        profile_tables.flops(found, text, notes)
    rows = [{"table": e.table, "model": e.name, "text": text, **counts} for e, counts in found]
    return {"rows": rows, "notes": notes}


def _settings(args: argparse.Namespace) -> tuple[list[int], list[int], list[int]] | None:
    """(tokens, pre-fusion layers, resolutions) if any was given."""
    given = (args.tokens, args.layers, args.resolution)
    if not any(given):
        return None
    return args.tokens or [1], args.layers or [4], args.resolution or [336]


# ----------------------------------------------------------------------------------------- latency


def latency(args: argparse.Namespace) -> dict[str, Any]:
    models, side = candidates(
        args, args.dtype or [None], llm_layers=args.llm_layers, vision_layers=args.vision_layers
    )
    request = _request(args, next(iter(models.values())).cfg, side)
    runs = {name: timing.runner(model, request) for name, model in models.items()}
    for name, model in models.items():
        if args.follow_up and model.cfg.prefusion_layers:
            runs[name + FOLLOW_UP] = follow_up.runner(timing.askable(model), request)
    (read, nbytes), (multiply, products) = machine.reader(), machine.multiplier("float32")
    runs |= {"read": timing.timed(read), "products": timing.timed(multiply)}
    with watching("measuring", stays=False) as watch:
        found = timing.in_turns(runs, args.repeats, watch)
    spreads = {name: [timing.spread(each) for each in found[name]] for name in found}
    result = {
        "device": jax.local_devices()[0].device_kind,
        "dtype": " ".join(args.dtype or [next(iter(models.values())).cfg.compute_dtype]),
        "request": dataclasses.asdict(request) | {"resolution": side, "repeats": args.repeats},
        "milliseconds": {n: dict(zip(("first", "token"), spreads[n], strict=True)) for n in models},
        "follow-up": {n: spreads[n + FOLLOW_UP] for n in models if n + FOLLOW_UP in spreads},
        "machine": {
            "GB/s": nbytes / 1e6 / spreads["read"][0].median,
            "GFLOP/s": products / 1e6 / spreads["products"][0].median,
        },
        "token bytes": {name: machine.token_bytes(m.params) for name, m in models.items()},
        "first FLOPs": {name: _flops(m.cfg, request, side) for name, m in models.items()},
    }
    if not args.json:
        profile_tables.latency(result, BASELINE, paper=args.abstract == "vicuna-7b")
    return json.loads(json.dumps(result, default=dataclasses.asdict))


def _flops(cfg: LlavaMiniConfig, request: Request, side: int) -> float:
    """Of a first token."""
    shape = paper_figures.shape(cfg, request.text, side)
    length = request.text + request.images * cfg.tokens_per_image(request.parts)
    shape = dataclasses.replace(shape, images=request.images, sequence=length)
    return sum(flops_of.forward_flops(cfg, shape).values())


def candidates(
    args: argparse.Namespace,
    dtypes: list[str | None],
    *,
    llm_layers: int | None = None,
    vision_layers: int | None = None,
) -> tuple[dict[str, Candidate], int]:
    """Models by name in each dtype, LLaVA-1.5 first, and the resolution in pixels.

    Of `args`: model, abstract, tokens, layers, resolution, vision_tower.
    """
    if args.model:
        if len(dtypes) > 1:
            raise InputError(f"--dtype has {len(dtypes)} names; give one for a MODEL")
        with loading(args.model) as watch:
            model = load(args.model, dtype=dtypes[0], vision_tower=args.vision_tower, watch=watch)
        cfg = model.bundle.model
        found = {BASELINE: Candidate(shared_params(model.params), llava_1_5(cfg))}
        side = _one(args, "resolution", cfg.vision.image_size * model.bundle.images.grid)
        return found | {args.model: Candidate(model.params, cfg)}, side
    tokens, layers, sides = _settings(args) or ([1], [4], [336])
    rows = paper_figures.rows(tokens, layers, sides[:1])
    llm = backbone(args.abstract or _no_shape())
    llm = dataclasses.replace(llm, layers=llm_layers or llm.layers)
    built = {row.name if row.tokens else BASELINE: paper_figures.build(row, llm) for row in rows}
    found, made = {}, {}
    for given in dtypes:
        dtype = computing_dtype(given)  # a narrow one is rounded from it; it may be made already
        if dtype not in made:
            typed = {n: _cut(cfg, dtype, vision_layers) for n, cfg in built.items()}
            made[dtype] = timing.random_candidates(typed, dtype)
        each = timing.rounded(made[dtype], given) if given in NARROW_DTYPES else made[dtype]
        found |= {n if len(dtypes) == 1 else f"{n}, {given}": m for n, m in each.items()}
    return found, _one(args, "resolution", 336)


def _cut(cfg: LlavaMiniConfig, dtype: str, vision_layers: int | None) -> LlavaMiniConfig:
    """In a dtype, and with so many blocks of the tower before its features are taken."""
    used = cfg.vision.used_layers
    layers = cfg.vision.layers - used + (vision_layers or used)
    vision = dataclasses.replace(cfg.vision, layers=layers)
    return dataclasses.replace(cfg, vision=vision, compute_dtype=dtype)


def _no_shape() -> str:
    raise InputError("no model is given; give a folder, or a shape with --abstract vicuna-7b")


def _one(args: argparse.Namespace, option: str, default: int) -> int:
    given = getattr(args, option) or [default]
    if len(given) > 1:
        raise InputError(f"--{option} has {len(given)} numbers; give one")
    return given[0]


def _request(args: argparse.Namespace, cfg: LlavaMiniConfig, side: int) -> Request:
    text = paper_figures.TEXT if args.text is None else args.text
    parts = paper_figures.shape(cfg, text, side).parts
    new = NEW_TOKENS if args.new_tokens is None else args.new_tokens
    return Request(text=text, images=args.frames, parts=parts, new_tokens=new)


# ------------------------------------------------------------------------------------------ memory


def memory(args: argparse.Namespace) -> dict[str, Any]:
    if not args.peak:
        refuse(args, ["text", "new_tokens", "dtype", "compilation_cache"], "without --peak")
    if args.dtype in NARROW_DTYPES:
        raise InputError(
            f"--dtype {args.dtype} is for profile latency; here its bytes are always shown"
        )
    cfg, side = _shape(args, computing_dtype(args.dtype or "bfloat16"))
    side = _one(args, "resolution", side)
    request = _request(args, cfg, side)
    weights = {d: inference_memory.weight_bytes(cfg, d) for d in inference_memory.DTYPES}
    kept = {}
    for name, each in ((BASELINE, llava_1_5(cfg)), ("this model", cfg)):
        image = inference_memory.cache_bytes_per_image(each, request.parts)
        kept[name] = {
            "tokens an image": each.tokens_per_image(request.parts),
            "bytes a token": inference_memory.cache_bytes_per_token(each),
            "bytes an image": image,
            "bytes of all": image * request.images,
        }
    result: dict[str, Any] = {"weights": weights, "cache": kept}
    if args.peak:
        with waiting("compiling"):
            result["programs"] = _programs(args, cfg, request)
    if args.peak and jax.default_backend() != "cpu":
        result["allocator_peak"] = _measured_peak(args, request)
    if not args.json:
        profile_tables.memory(result, request.images)
    return result


def _programs(args: argparse.Namespace, cfg: LlavaMiniConfig, request: Request) -> Any:
    dtype = computing_dtype(args.dtype)
    typed = dataclasses.replace(cfg, compute_dtype=dtype)
    found = inference_memory.compiled_programs(typed, request, dtype)
    each = {n: dataclasses.asdict(p) | {"total": p.total} for n, p in found.items()}
    return {"dtype": dtype, "bytes": each}


def _measured_peak(args: argparse.Namespace, request: Request) -> int | None:
    """The allocator's, after the model's requests alone: LLaVA-1.5 would have its own peak."""
    models, _ = candidates(args, [args.dtype])
    models.pop(BASELINE)
    timing.measure(models, request, 1)
    return inference_memory.allocator_peak()


# ------------------------------------------------------------------------------------------ shared


def _shape(args: argparse.Namespace, dtype: str) -> tuple[LlavaMiniConfig, int]:
    """A folder's configuration, or a named shape's, and its images' resolution in pixels.

    No weight is read.
    """
    if args.model:
        tower = None if args.vision_tower is None else Path(args.vision_tower)
        folder = hub.resolve_folder(args.model)
        bundle, _ = folders.open_model(folder, vision_tower=tower, compute_dtype=dtype)
        return bundle.model, bundle.model.vision.image_size * bundle.images.grid
    llm = backbone(args.abstract or _no_shape())
    tokens, layers = _one(args, "tokens", 1), _one(args, "layers", 4)
    row = paper_figures.PaperModel(tokens=tokens, layers=layers)
    return dataclasses.replace(paper_figures.build(row, llm), compute_dtype=dtype), 336


MEASURES = {"flops": flops, "latency": latency, "memory": memory}
