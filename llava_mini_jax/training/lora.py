"""A stage with LoRA: what it trains then, what its frozen weights are kept in, what is refused.

A component that has adapters ("llm") is frozen but for these: `trainable` loses its patterns.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llava_mini_jax import params as param_tree
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.lora import BASES, LEARNT, LoraConfig, is_lora
from llava_mini_jax.params import ParamSpec, Tree
from llava_mini_jax.weights.quantize import GROUPS, group_of, quantize, rounded_shapes


def trainable_with(
    cfg: LoraConfig, model: LlavaMiniConfig, trainable: Sequence[str]
) -> tuple[str, ...]:
    """The path patterns of what is trained: adapters, and of `trainable` what is beside them.

    Raises InputError for targets that match nothing, or no matrix, and for patterns that mean a
    frozen component and another one.
    """
    leaves = param_tree.paths(llava_mini.spec(model))
    chosen = {path: leaf for path, leaf in leaves.items() if param_tree.matches(path, cfg.targets)}
    _check(cfg, chosen)
    adapted = {path.split("/")[0] for path in chosen}
    kept = []
    for pattern in trainable:
        components = {p.split("/")[0] for p in leaves if param_tree.matches(p, (pattern,))}
        if components & adapted and components - adapted:
            raise InputError(
                f'with lora the pattern "{pattern}" of trainable means '
                f"{', '.join(sorted(components & adapted))}, which is frozen, and others: name"
                ' what is trained beside the adapters, such as "projector/*"'
            )
        kept += [] if components & adapted else [pattern]
    return (*kept, *LEARNT)


def _check(cfg: LoraConfig, chosen: Mapping[str, ParamSpec]) -> None:
    if cfg.rank < 0 or cfg.alpha < 0:
        raise InputError(
            f"lora.rank and .alpha are {cfg.rank} and {cfg.alpha:g}; give numbers from 0 on"
        )
    if cfg.base not in BASES:
        raise InputError(f'lora.base is "{cfg.base}"; expected {", ".join(BASES)}')
    if cfg.base == "int4":
        _check_groups(chosen)
    for pattern in cfg.targets:
        if not any(param_tree.matches(path, (pattern,)) for path in chosen):
            raise InputError(
                f'lora.targets: "{pattern}" matches no parameter; `llava-mini inspect` lists the'
                " paths"
            )
    for path, leaf in chosen.items():
        if len(leaf.shape) - leaf.stacked < 2 or not path.endswith("_proj"):
            raise InputError(
                f"lora.targets: {path} is not a weight of a product in the layers; name weights"
                ' such as "llm/layers/*_proj"'
            )


def _check_groups(chosen: Mapping[str, ParamSpec]) -> None:
    for path, leaf in chosen.items():
        inputs = math.prod(leaf.shape[leaf.output_axes :])
        if group_of(inputs) is None:
            raise InputError(
                f'lora.base is "int4", but {path} has {inputs} inputs, not a multiple of'
                f" {GROUPS[-1]}: set lora.base to int8 or same"
            )


def with_base(params: Tree, cfg: LoraConfig) -> Tree:
    """Parameters, or their abstract shapes, with frozen weights as `cfg.base` says."""
    if not cfg.rank or cfg.base == "same":
        return params

    def one(leaf: Any) -> Any:
        if not is_lora(leaf):
            return leaf
        channels = leaf.lora_b.ndim - 1
        if isinstance(leaf.base, jax.ShapeDtypeStruct):
            base = rounded_shapes(leaf.base, channels, cfg.base)
        else:
            base = quantize(leaf.base, channels, cfg.base)
        return dataclasses.replace(leaf, base=base)

    return jax.tree.map(one, params, is_leaf=is_lora)
