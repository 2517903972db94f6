"""The parameters that a stage begins with: what the one before left, and what is new.

what the one before left --same?--> moved to this mesh, stacked or unrolled, cast --.
                                                                                    |--> params
`fresh`, and components that are new --> initialised, or copies of LLM layers ------'
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.lora import bases, plain_paths
from llava_mini_jax.training.lora import with_base
from llava_mini_jax.training.stages import TrainConfig, spec_of

_PUT_BACK = ("/o_proj", "/down_proj")  # the products of a block that end in the sequence
_LAYER = re.compile(r"(.*/layers)/(\d+)/(.*)")  # the path of a parameter of an unrolled layer


def starting_params(stage: TrainConfig, previous: LlavaMini | None, key: jax.Array) -> LlavaMini:
    """The parameters that a stage begins with, frozen weights beside adapters as `lora.base` says.

    What the previous stage has and `fresh` does not name is taken over, in this stage's dtype and
    form (stacked or unrolled layers) and on its mesh. The rest is initialised from `key`: what
    `fresh` names, and components that the previous stage has nothing of. Raises InputError where
    the two have different parameters of a component otherwise.
    """
    spec = spec_of(stage)
    kept = {} if previous is None else _carried_over(stage, previous, spec)
    _check_bases(stage, spec, kept)
    new = param_tree.split(spec, lambda path: path not in kept)[0]
    made = param_tree.paths(param_tree.init(key, new, stage.param_dtype))
    params = param_tree.map_paths(lambda path, _: (kept if path in kept else made)[path], spec)
    if stage.prefusion_init == "copy":
        params = _copy_llm_layers(stage, params, made)
    elif stage.prefusion_init == "identity":
        params = _silent(params, made)
    return with_base(params, stage.lora)


def _carried_over(stage: TrainConfig, previous: LlavaMini, spec: LlavaMini) -> dict[str, jax.Array]:
    left, plain = param_tree.paths(previous), plain_paths(spec)
    wanted = {path: leaf for path, (_, leaf) in plain.items()}
    _check_same(stage, _shapes(left, stage.scan_layers), _shapes(wanted, None))
    components = {path.split("/")[0] for path in left}

    def take(path: str, wanted: param_tree.ParamSpec) -> jax.Array:
        # The stage before may have had another mesh: its arrays are moved before they are used.
        if path in left:
            return sharding.place(left[path], wanted.axes)
        if wanted.stacked:
            before, name = path.split("/layers/", 1)
            layers = (left[f"{before}/layers/{i}/{name}"] for i in range(wanted.shape[0]))
            return jnp.stack([sharding.place(layer, wanted.axes[1:]) for layer in layers])
        layer = _LAYER.fullmatch(path)
        assert layer is not None  # the check has found it
        stacked = left[f"{layer[1]}/{layer[3]}"]
        return sharding.place(stacked, ("layers", *wanted.axes))[int(layer[2])]

    return {
        own: take(path, leaf).astype(stage.param_dtype)
        for path, (own, leaf) in plain.items()
        if path.split("/")[0] in components and not param_tree.matches(path, stage.fresh)
    }


def _check_bases(stage: TrainConfig, spec: LlavaMini, kept: dict[str, jax.Array]) -> None:
    """InputError for an adapter beside a weight that this stage begins anew: it would stay so."""
    for path, (own, _) in plain_paths(spec).items():
        if own != path and own not in kept:
            raise InputError(
                f"{stage.name}: lora.targets name {path}, which this stage starts from scratch,"
                " and a frozen weight is never learnt: remove it from the targets, or start from a"
                " folder that has it"
            )


def _shapes(leaves: dict[str, Any], stacked: bool | None) -> dict[str, tuple[int, ...]]:
    """Shapes by path, as they would be with layers stacked, or not; None: as they are."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves.items():
        layer = _LAYER.fullmatch(path)
        if stacked and layer:
            name = f"{layer[1]}/{layer[3]}"
            count, *_ = shapes.get(name, (0,))
            shapes[name] = (count + 1, *leaf.shape)
        elif stacked is False and not layer and "/layers/" in path:
            before, name = path.split("/layers/", 1)
            count, *shape = leaf.shape
            shapes |= {f"{before}/layers/{i}/{name}": tuple(shape) for i in range(count)}
        else:
            shapes[path] = leaf.shape
    return shapes


def _check_same(
    stage: TrainConfig, left: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """InputError where a component that both stages have is not the same in both."""
    both = {path.split("/")[0] for path in left} & {path.split("/")[0] for path in wanted}
    different = [
        f"{path} has shape {left.get(path, 'none')} after the stage before, but "
        f"{wanted.get(path, 'none')} here"
        for path in {**wanted, **left}
        if path.split("/")[0] in both
        and left.get(path) != wanted.get(path)
        and not param_tree.matches(path, stage.fresh)
    ]
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(
            f"{stage.name}: {'; '.join(different[:3])}{more}: name what is to start from scratch "
            "in `fresh`, or give both stages the same model"
        )


def _copy_llm_layers(
    stage: TrainConfig, params: LlavaMini, made: dict[str, jax.Array]
) -> LlavaMini:
    """New pre-fusion layers as copies of the language model's first ones.

    An option of our own: nobody has said what the authors did (docs/release.md, "Training").
    """
    if params.prefusion is None or not any(path.startswith("prefusion/") for path in made):
        return params
    own, given = stage.model.prefusion_layers, stage.model.llm.layers
    if own > given:
        raise InputError(
            f"{stage.name}: {own} pre-fusion layers cannot be copies of {given} layers of "
            'the language model: set prefusion_init to "fresh", or prefusion_layers to that number'
        )
    layers: Any = bases(params.llm.layers)
    new = params.prefusion.layers
    if isinstance(new, tuple):
        # The state is donated, and no buffer can be given away twice.
        copied: Any = jax.tree.map(lambda a: a.copy(), layers[: len(new)])
    else:
        # A slice of everything is the same buffer, so this is copied, too.
        copied = jax.tree.map(lambda a, b: a[: len(b)].copy(), layers, new)
    prefusion = dataclasses.replace(params.prefusion, layers=copied)
    return dataclasses.replace(params, prefusion=prefusion)


def _silent(params: LlavaMini, made: dict[str, jax.Array]) -> LlavaMini:
    """New pre-fusion layers that add nothing at first: what attention and the MLP put back into
    the sequence is zero.

    An option of our own. The language model begins with text that it knows, and not with what new
    layers, or its own first ones, have made of it.
    """

    def one(path: str, leaf: Any) -> Any:
        is_silent = path.startswith("prefusion/") and path.endswith(_PUT_BACK)
        return jnp.zeros_like(leaf) if is_silent and path in made else leaf

    return param_tree.map_paths(one, params)
