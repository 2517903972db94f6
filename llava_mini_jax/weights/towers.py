"""Vision towers of model folders: where one lies, and its config.json into ClipConfig.

mm_vision_tower, --vision-tower --find_tower--> its folder, or None: it is in the model's files
vision_config, or that folder's config.json --tower_config, clip_from_hf--> ClipConfig
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_mini_jax.config import CLIP_L_336
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.weights import hf_fields, names
from llava_mini_jax.weights.hf_config import config_fields
from llava_mini_jax.weights.hf_processor import Processor
from llava_mini_jax.weights.hub import expanded, resolve_folder

# Published towers whose configuration is known without their folder.
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_L_336}

TYPES = ("clip_vision_model", "clip")
# What transformers' class leaves out of a file because it is a default.
_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)


def find_tower(
    folder: Path, f: Fields, tensors: Iterable[str], override: Path | None
) -> Path | None:
    """The tower's own folder, or None where the model folder says all about it."""
    name = f.get("mm_vision_tower", str, "")
    if override is not None:
        return resolve_folder(override)
    for candidate in (folder / name, folder.parent / name, expanded(name)):
        if name and _is_file(candidate / "config.json"):
            return candidate
    known = name in KNOWN_TOWERS or f.values.get("vision_config") is not None
    if known and has_tower(tensors):
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return resolve_folder(name)
    raise InputError(
        f'{f.where}: the vision tower "{name}" is neither a folder beside the model nor in its '
        "weight files: give its folder with --vision-tower"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        return False


def tower_config(f: Fields, tower: Path | None, processor: Processor) -> ClipConfig:
    """Of the tower's own folder, or else of what the model's config.json (`f`) says of it."""
    select_layer = f.get("mm_vision_select_layer", int, -2)
    feature = f.get("mm_vision_select_feature", str, "patch")
    found, source = f.get("vision_config", dict, None), f"{f.where}: vision_config"
    if tower is None and found is None:
        known = KNOWN_TOWERS[f.get("mm_vision_tower", str)]
        return dataclasses.replace(known, select_layer=select_layer, select_feature=feature)
    if tower is not None:
        own = config_fields(tower)
        found, source = own.values, own.where
    assert found is not None
    return clip_from_hf(
        found, source, select_layer=select_layer, select_feature=feature, processor=processor
    )


def has_tower(tensors: Iterable[str]) -> bool:
    """Whether a model's own files hold its tower."""
    prefix = (names.LAYOUTS["release"].vision or "").removesuffix(names.VISION_MODEL)
    return any(name.startswith(prefix) for name in tensors)


def clip_from_hf(
    values: dict[str, Any],
    where: str,
    *,
    select_layer: int,
    select_feature: str,
    processor: Processor,
) -> ClipConfig:
    """ClipConfig of a tower's config.json (a full CLIP's is nested under `vision_config`).

    Pictures are normalised with `processor`'s mean and deviation.
    """
    f = _vision_fields(values, where)
    f.only("num_channels", 3, because="pictures have other channels than red, green and blue")
    f.only("pruned_heads", {}, because="attention heads were cut out")
    f.only("is_encoder_decoder", False, because="the model has an encoder of its own")
    f.only("add_cross_attention", False, because="the model has cross-attention")
    f.only("tie_encoder_decoder", False, because="the model has an encoder of its own")
    f.only("model_type", *TYPES, because="the tower is no CLIP")
    config = ClipConfig(
        image_size=f.size("image_size"),
        patch_size=f.size("patch_size"),
        width=f.size("hidden_size"),
        mlp_width=f.size("intermediate_size"),
        layers=f.size("num_hidden_layers"),
        heads=f.size("num_attention_heads"),
        norm_eps=f.positive("layer_norm_eps"),
        activation=f.get("hidden_act", str),
        select_layer=select_layer,
        select_feature="patch" if select_feature == "default" else select_feature,
        mean=processor.mean,
        std=processor.std,
    )
    f.finish(hf_fields.CLIP_HARMLESS)
    return config


def _vision_fields(values: dict[str, Any], where: str) -> Fields:
    """The fields that describe the tower; InputError for what is no CLIP."""
    f = Fields(values, where)
    kind = f.get("model_type", str, "clip" if "vision_config" in values else "clip_vision_model")
    if kind not in TYPES:
        raise InputError(
            f'{where}: a vision tower of model_type "{kind}" is not supported; use a CLIP'
            f" ({' or '.join(TYPES)})"
        )
    if kind == "clip":
        nested = f.get("vision_config", dict)
        _refuse_override(f, nested)
        f = Fields(nested, f"{where}: vision_config")
    f.defaults = _DEFAULTS
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if f.size(whole) % f.size(part):
            raise InputError(
                f"{f.where}: {whole} {f.size(whole)} is not a multiple of {part} {f.size(part)}"
            )
    return f


def _refuse_override(f: Fields, nested: dict[str, Any]) -> None:
    """Old files of full CLIPs also have `vision_config_dict`, which wins over `vision_config`."""
    for name, value in f.get("vision_config_dict", dict, {}).items():
        if name not in _DEFAULTS or value is None:
            continue
        if value != (other := nested.get(name, _DEFAULTS[name])):
            raise InputError(
                f'{f.where}: "vision_config" and "vision_config_dict" contradict each other in'
                f' "{name}" ({other!r}, {value!r}); take the wrong one out'
            )
