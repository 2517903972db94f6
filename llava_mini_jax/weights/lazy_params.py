"""Parameters that still lie on disk: what conversions read leaf by leaf.

Published tensors --plan, checked--> a tree of leaves, none of them read yet
                                         |  numpy.asarray(leaf), one after another
                        export_hf.export_model writes them: one shard in memory, not the model

open_model(folder)                              --> the tree of a whole model
start_from_parts(CLIP folder, LLaMA folder)     --> the tree that a training run begins with:
                                                    what is new is made when it is asked for
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import read_json
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import ParamSpec
from llava_mini_jax.weights import folders, hf_prompt
from llava_mini_jax.weights.import_hf import Piece, Pieces, Published, make_plan
from llava_mini_jax.weights.methods import Asked

PREFUSION_STARTS = ("fresh", "copy")
FRESH = ("projector/*", "compressor/*", "prefusion/*")

Watch = Callable[[int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyLeaf:
    """One parameter as numpy gets it: read, or made, each time that it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]  # of a stack its layers, else one
    stacked: bool
    watch: Watch  # is told the bytes of each reading

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, layer: int) -> "LazyLeaf":
        part = self.parts[layer]
        return dataclasses.replace(self, shape=self.shape[1:], parts=(part,), stacked=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        arrays = [part().astype(dtype or self.dtype, copy=False) for part in self.parts]
        array = np.stack(arrays) if self.stacked else arrays[0]
        self.watch(array.nbytes)
        return array


def lazy_params(
    bundle: Bundle,
    plan: Pieces,
    *,
    dtype: str | None,
    made: Mapping[str, Callable[[], np.ndarray]] | None = None,
    watch: Watch = lambda _: None,
) -> LlavaMini:
    """The unrolled parameters of a plan; `dtype` None keeps the dtype of each tensor.

    `made` has the leaves (by path) that the plan lacks.
    """
    made = made or {}

    def leaf(path: str, spec: ParamSpec) -> LazyLeaf:
        own, parts = jnp.dtype(bundle.model.compute_dtype), (made[path],) if path in made else ()
        if path in plan:
            shape = spec.shape[spec.stacked :]  # of a layer
            parts = tuple(partial(_read_piece, piece, shape) for piece in plan[path])
            own = plan[path][0].tensor.dtype if parts else own
        return LazyLeaf(spec.shape, jnp.dtype(dtype) if dtype else own, parts, spec.stacked, watch)

    return param_tree.map_paths(leaf, _spec(bundle))


def _spec(bundle: Bundle) -> LlavaMini:
    return llava_mini.unrolled(llava_mini.spec(bundle.model))


def _read_piece(piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
    return piece.read(shape, tuple(slice(0, size) for size in shape))


def stored_dtype(published: Iterable[Published]) -> str:
    """The dtype of the largest tensor: what people call a model's dtype."""
    tensors = [t for folder in published for t in folder.tensors.values()]
    return max(tensors, key=lambda t: t.nbytes).dtype.name


def open_for_export(
    folder: Path,
    *,
    vision_tower: Path | None,
    base: Path | None = None,
    compressor: Asked | None = None,
    dtype: str | None,
    watch: Watch = lambda _: None,
) -> tuple[Bundle, LlavaMini]:
    """A model folder as `export_model` takes it, nothing read yet."""
    bundle, published = folders.open_model(
        folder,
        vision_tower=vision_tower,
        base=base,
        compressor=compressor,
        compute_dtype=dtype or "float32",
    )
    model = dataclasses.replace(bundle.model, compute_dtype=dtype or stored_dtype(published))
    bundle = dataclasses.replace(bundle, model=model)
    return bundle, lazy_params(
        bundle, make_plan(_spec(bundle), bundle.model, published), dtype=dtype, watch=watch
    )


def start_from_parts(
    vision_tower: Path,
    llm: Path,
    *,
    dialect: str,
    grid: int,
    prefusion_layers: int,
    prefusion_init: str,
    seed: int,
    dtype: str | None,
    watch: Watch = lambda _: None,
) -> tuple[Bundle, LlavaMini]:
    """A training run's starting point: a public CLIP and a public LLaMA, everything else new.

    `prefusion_init` "copy" begins pre-fusion with the language model's first layers, "fresh" with
    random ones (the release's; the paper does not say). With `dtype` None, tensors that exist keep
    theirs and new ones get the language model's.
    """
    if prefusion_init not in PREFUSION_STARTS:
        raise InputError(
            f'prefusion init "{prefusion_init}" is unknown; use {" or ".join(PREFUSION_STARTS)}'
        )
    vision, language, published = folders.open_parts(vision_tower, llm)
    stored = dtype or stored_dtype(published[1:])
    template, _ = hf_prompt.template_of(language, llm, llava=False)
    values = read_json(llm / "config.json")
    bundle = Bundle(
        model=_new_model(vision, language, dialect, grid, prefusion_layers, stored),
        images=configs.image_config(dialect, vision),
        prompt=configs.prompt_config(dialect, template, language.max_positions),
        eos_ids=hf_prompt.eos_ids(llm, values),
        pad_id=values.get("pad_token_id") or 0,
    )
    plan = make_plan(_spec(bundle), bundle.model, published, FRESH)
    if prefusion_init == "copy":
        own = [p for p in param_tree.paths(_spec(bundle)) if p.startswith("prefusion/layers/")]
        plan |= {path: plan[path.replace("prefusion/", "llm/", 1)] for path in own}
    made = _new_leaves(_spec(bundle), plan, seed, stored)
    return bundle, lazy_params(bundle, plan, dtype=dtype, made=made, watch=watch)


def _new_model(
    vision: ClipConfig, llm: LlamaConfig, dialect: str, grid: int, prefusion_layers: int, dtype: str
) -> LlavaMiniConfig:
    if not 1 <= grid <= vision.grid:
        raise InputError(f"grid is {grid}; give 1 to {vision.grid}, the patches along one side")
    if not 0 <= prefusion_layers <= llm.layers:
        raise InputError(
            f"{prefusion_layers} pre-fusion layers are asked for; give 0 to {llm.layers}, the"
            " layers of the language model"
        )
    try:
        return configs.build(
            llm, vision, dialect, grid=grid, prefusion_layers=prefusion_layers, compute_dtype=dtype
        )
    except ValueError as error:
        raise InputError(f"these parts do not make a {dialect} model: {error}") from error


def _new_leaves(
    spec: LlavaMini, existing: Pieces, seed: int, dtype: str
) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of what no file has: made together, when the first of them is asked for."""
    new = param_tree.split(spec, lambda path: path not in existing)[0]

    @cache
    def made() -> dict[str, jax.Array]:
        params = param_tree.init(jax.random.key(seed), new, jnp.dtype(dtype))
        return param_tree.paths(params)

    return {path: lambda p=path: np.asarray(made()[p]) for path in param_tree.paths(new)}
