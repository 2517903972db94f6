"""`llava-mini inspect`: what a model consists of, from headers and configuration alone.

MODEL folder: config.json + headers of weight files --.
--abstract NAME: a configuration --------------------- +--> one line a parameter: shape, dtype,
                                                            sharding, which stages train it
                                                       --> totals of each component
                                                       --> the configuration, field by field
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax.arguments import BACKBONES_HELP, JSON, VISION_TOWER, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import columns, human_bytes, print_json, waiting

SUMMARY = "list a model's parameters, sizes, sharding and configuration without loading it"
USAGE = """llava-mini inspect MODEL [options]
       llava-mini inspect --abstract NAME [options]"""
EXAMPLE = """examples:
  llava-mini inspect MODEL
  llava-mini inspect --abstract vicuna-7b --mesh data=1,fsdp=4,tensor=2"""

STAGES = ("stage 1", "stage 2")
ABSTRACT_OPTIONS = ("dialect", "grid", "prefusion_layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add("--mesh", metavar="AXES", help="show the sharding on a mesh such as data=1,fsdp=4,tensor=2")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)
    add("--json", action="store_true", help=JSON)
    shapes = parser.add_argument_group("without a folder")
    add = shapes.add_argument
    add("--abstract", metavar="NAME", help=BACKBONES_HELP)
    add("--dialect", help="paper or release (default: paper)")
    add("--grid", type=int, metavar="C", help="C*C tokens an image (default: 1)")
    add("--prefusion-layers", type=int, metavar="N", help="default: 4")


@dataclasses.dataclass(frozen=True)
class Parameter:
    path: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    sharding: str  # empty without a mesh
    ways: int  # on how many devices the parameter is split
    stages: tuple[bool, ...]  # trained in stage 1, in stage 2

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.itemsize


def run(args: argparse.Namespace) -> int:
    from llava_mini_jax.sharding import MeshConfig

    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if (args.model is None) == (args.abstract is None):
        raise InputError("give a model folder, or --abstract NAME (one of the two)")
    with waiting("reading headers"):
        model, shown, dtypes = _abstract(args) if args.model is None else _folder(args)
        rows = list(_rows(model, dtypes, mesh))
    from llava_mini_jax.config import dialect_of
    from llava_mini_jax.ops.attention import describe

    width, windowed = model.llm.head_width, model.llm.window is not None
    about = {
        "dialect": dialect_of(model),
        "attention here": describe(model.attention, model.dtype, width, windowed=windowed),
    }
    if args.json:
        print_json(_document(rows, mesh) | about | {"config": dict(_fields(shown))})
        return 0
    print(*_parameter_table(rows), "", *_component_table(rows, mesh), "", sep="\n")
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    if args.model is not None:
        from llava_mini_jax.weights.hf_prompt import template_told
        from llava_mini_jax.weights.hub import resolve_folder

        print(template_told(shown, resolve_folder(args.model)))
    for name, value in _fields(shown):
        print(f"{name}: {value}")
    return 0


def _document(rows: list[Parameter], mesh: Any) -> dict[str, Any]:
    """What the tables show, for programs; bytes of a device and shardings where there is a mesh."""
    return {
        "parameters": {
            row.path: {
                "shape": row.shape,
                "dtype": row.dtype,
                "sharding": row.sharding if mesh else None,
                "trained": dict(zip(STAGES, row.stages, strict=True)),
            }
            for row in rows
        },
        "components": {
            name: {
                "parameters": sum(row.count for row in members),
                "bytes": sum(row.nbytes for row in members),
                "device_bytes": sum(row.nbytes // row.ways for row in members) if mesh else None,
                "trained": dict(zip(STAGES, _trained(members), strict=True)),
            }
            for name, members in _components(rows).items()
        },
    }


def _abstract(args: argparse.Namespace) -> tuple[Any, Any, dict[str, str]]:
    from llava_mini_jax import config as configs

    refuse(args, ["vision_tower"], "with --abstract")
    try:
        model = configs.build(
            configs.backbone(args.abstract),
            configs.tower_of(args.abstract),
            args.dialect or "paper",
            grid=1 if args.grid is None else args.grid,
            prefusion_layers=4 if args.prefusion_layers is None else args.prefusion_layers,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"no such model: {error}") from error
    return model, model, {}


def _folder(args: argparse.Namespace) -> tuple[Any, Any, dict[str, str]]:
    """The folder's configuration, and the dtype of each of its parameters."""
    from llava_mini_jax.weights import lazy_params
    from llava_mini_jax.weights.hub import resolve_folder

    refuse(args, ABSTRACT_OPTIONS, "without --abstract")
    tower = None if args.vision_tower is None else Path(args.vision_tower)
    bundle, params = lazy_params.open_for_export(
        resolve_folder(args.model), vision_tower=tower, dtype=None
    )
    from llava_mini_jax import params as param_tree

    leaves = param_tree.paths(params)
    return bundle.model, bundle, {path: leaf.dtype.name for path, leaf in leaves.items()}


def _rows(model: Any, dtypes: dict[str, str], mesh: Any) -> Iterator[Parameter]:
    """Stacked parameters in the order of the model; a stack of mixed dtypes names the first."""
    import jax.numpy as jnp

    from llava_mini_jax import params as param_tree
    from llava_mini_jax import sharding
    from llava_mini_jax.models import llava_mini
    from llava_mini_jax.training.stages import STAGE_1, STAGE_2

    with sharding.planned_mesh(mesh or sharding.MeshConfig()):
        for path, spec in param_tree.paths(llava_mini.spec(model)).items():
            stored = dtypes.get(path) or dtypes.get(_first_layer(path)) or "bfloat16"
            dtype = jnp.dtype(stored)
            ways = math.prod(spec.shape) // math.prod(sharding.piece(spec.shape, spec.axes))
            text = ",".join(sharding.placement(spec.shape, spec.axes)) if mesh else ""
            stages = tuple(param_tree.matches(path, stage) for stage in (STAGE_1, STAGE_2))
            yield Parameter(path, spec.shape, dtype.name, dtype.itemsize, text, ways, stages)


def _first_layer(path: str) -> str:
    """The path in the unrolled tree of a parameter's first layer."""
    return path.replace("layers/", "layers/0/", 1)


def _parameter_table(rows: list[Parameter]) -> list[str]:
    sharded = any(row.sharding for row in rows)
    head = ["parameter", "shape", "dtype", *["sharding"] * sharded, *STAGES]
    lines = [head]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        marks = ["trained" if trained else "frozen" for trained in row.stages]
        lines.append([row.path, shape, row.dtype, *[row.sharding] * sharded, *marks])
    return columns(lines, left=len(head))


def _components(rows: list[Parameter]) -> dict[str, list[Parameter]]:
    """The parameters of each component, and of all as "total"."""
    groups: dict[str, list[Parameter]] = {}
    for row in rows:
        groups.setdefault(row.path.split("/")[0], []).append(row)
    return groups | {"total": rows}


def _trained(members: list[Parameter]) -> list[int]:
    """How many of them stage 1 trains, and stage 2."""
    return [sum(row.count for row in members if row.stages[s]) for s in (0, 1)]


def _component_table(rows: list[Parameter], mesh: Any) -> list[str]:
    head = ["component", "parameters", "bytes", ""]
    lines = [[*head, *["a device"] * bool(mesh), "trained in stage 1", "trained in stage 2"]]
    for name, members in _components(rows).items():
        nbytes = sum(row.nbytes for row in members)
        device = sum(row.nbytes // row.ways for row in members)
        lines.append(
            [
                name,
                f"{sum(row.count for row in members):,}",
                f"{nbytes:,}",
                human_bytes(nbytes),
                *[human_bytes(device)] * bool(mesh),
                *(f"{count:,}" for count in _trained(members)),
            ]
        )
    return columns(lines)


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("llm.width", 4096) and so on, for a configuration and those inside it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
