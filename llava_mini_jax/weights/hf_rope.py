"""Rotary positions in Hugging Face's config.json, both ways.

    rope_theta, rope_scaling (before transformers 5), rope_parameters --rope_from_hf--> RopeConfig
    RopeConfig --rope_json--> rope_theta, rope_scaling

Scalings are linear, dynamic, llama3 and yarn; every other one, and every field that is not known,
is refused by name.
"""

import dataclasses
import math
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.ops.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    Scaling,
    YarnScaling,
)

_NAMES: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def rope_from_hf(f: Fields, theta: float, max_positions: int) -> RopeConfig:
    """The rotary angles. transformers 5 writes one object, `rope_parameters`; before there were
    `rope_theta` and `rope_scaling`. Where a file has both, they must say the same.

    `theta` is what the class takes where the file says nothing.
    """
    old, new = f.object("rope_scaling"), f.object("rope_parameters")
    base = f.positive("rope_theta", theta)
    found = {
        name: _rope_of(Fields(one, f"{f.where}: {name}"), f, base, max_positions)
        for name, one in (("rope_scaling", old), ("rope_parameters", new))
        if one is not None
    }
    if len(set(found.values())) > 1:
        raise InputError(
            f'{f.where}: "rope_scaling" and "rope_parameters" contradict each other'
            f" ({found['rope_scaling']}, {found['rope_parameters']}); remove the wrong one"
        )
    return next(iter(found.values()), RopeConfig(theta=base, scaling=None))


def _rope_of(r: Fields, f: Fields, base: float, max_positions: int) -> RopeConfig:
    theta = r.positive("rope_theta", base)
    if f.values.get("rope_theta") is not None and theta != base:
        raise InputError(
            f"{r.where} has rope_theta {theta:g}, but {f.where} says {base:g}; remove one"
        )
    kind = r.get("rope_type", str, r.get("type", str, "default"))
    if r.get("type", str, kind) != kind:
        raise InputError(f'{r.where} has rope_type "{kind}" and type "{r.values["type"]}"')
    r.only("partial_rotary_factor", 1, because="only a part of each head is rotated")
    if kind == "default":
        r.finish(("original_max_position_embeddings",))
        return RopeConfig(theta=theta, scaling=None)
    if kind not in _NAMES:
        raise InputError(
            f'{r.where}: scaling "{kind}" is not supported; use one of {", ".join(_NAMES)}, or none'
        )
    if kind == "yarn":
        scaling = _yarn(r, theta, max_positions)
    elif kind == "llama3":
        scaling = _llama3(r)
    else:
        one = LinearScaling if kind == "linear" else DynamicScaling
        scaling = one(factor=r.positive("factor"))
    r.finish(())
    return RopeConfig(theta=theta, scaling=scaling)


def _llama3(r: Fields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=r.positive("factor"),
        low_freq_factor=r.positive("low_freq_factor"),
        high_freq_factor=r.positive("high_freq_factor"),
        original_max_position_embeddings=r.size("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(
            f"{r.where}: high_freq_factor {scaling.high_freq_factor:g} is not above low_freq_factor"
            f" {scaling.low_freq_factor:g}; correct them"
        )
    return scaling


def _yarn(r: Fields, theta: float, max_positions: int) -> YarnScaling:
    if theta <= 1:
        raise InputError(f"{r.where}: yarn needs a rope_theta above 1, not {theta:g}; correct it")
    factor = r.positive("factor")
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=r.size("original_max_position_embeddings", max_positions),
        beta_fast=r.positive("beta_fast", 32.0),
        beta_slow=r.positive("beta_slow", 1.0),
        truncate=r.get("truncate", bool, True),
        attention_factor=_attention_factor(r, factor),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise InputError(
            f"{r.where}: beta_fast {scaling.beta_fast:g} is below beta_slow"
            f" {scaling.beta_slow:g}; correct them"
        )
    return scaling


def _attention_factor(r: Fields, factor: float) -> float:
    """What is written down, else what the paper suggests (or DeepSeek's rule of two scales)."""
    scales = [r.get(name, float, None) for name in ("mscale", "mscale_all_dim")]
    if r.get("attention_factor", float, None) is not None:
        return r.positive("attention_factor")

    def suggested(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if all(scales):
        return suggested(scales[0]) / suggested(scales[1])
    return suggested(1.0)


def rope_json(cfg: RopeConfig) -> dict[str, Any]:
    """The fields as every version of transformers reads them."""
    scaling = None
    if cfg.scaling is not None:
        kind = next(name for name, one in _NAMES.items() if isinstance(cfg.scaling, one))
        scaling = {"rope_type": kind, **dataclasses.asdict(cfg.scaling)}
    return {"rope_theta": cfg.theta, "rope_scaling": scaling}
