"""Vision towers of model folders, CLIP's and SigLIP's: where one lies, and its ClipConfig.

mm_vision_tower, --vision-tower --find_tower--> its folder, or None: it is in the model's files
vision_config, or that folder's config.json --tower_config, clip_from_hf--> ClipConfig
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_mini_jax.config import CLIP_L_336
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights import eva, hf_fields, names
from llava_mini_jax.weights.hf_config import config_fields
from llava_mini_jax.weights.hf_processor import Processor
from llava_mini_jax.weights.hub import expanded, resolve_folder

# Published towers whose configuration is known without their folder.
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_L_336}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a family of towers has of its own, as transformers' classes build it."""

    defaults: dict[str, Any]  # what the class leaves out of a file because it is a default
    own: dict[str, bool]  # fields of ClipConfig
    harmless: frozenset[str]


_SIZES = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
)
_CLIP = _Kind(
    _SIZES | dict(patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu"),
    dict(class_token=True, pre_norm=True, patch_bias=False),
    hf_fields.CLIP_HARMLESS,
)
_SIGLIP = _Kind(
    _SIZES | dict(patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
    dict(class_token=False, pre_norm=False, patch_bias=True),
    # The pooling head gives one vector of an image, which nobody here reads.
    hf_fields.CLIP_HARMLESS | {"vision_use_head"},
)
# LLaMA-VID's tower, in folders that are written here: transformers has none like it.
_EVA = _Kind(
    dict(layer_norm_eps=1e-6, hidden_act="gelu"),
    dict(class_token=True, pre_norm=False, patch_bias=True),
    hf_fields.CLIP_HARMLESS,
)
# SigLIP 2 of a fixed resolution has SigLIP's type.
TYPES = {
    "eva_vision_model": _EVA,
    "clip_vision_model": _CLIP,
    "clip": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip": _SIGLIP,
}
_WHOLE = ("clip", "siglip")  # with a text model beside the tower, which is nested


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
    known = known or eva.is_eva(tensors)
    if known and has_tower(tensors):
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return resolve_folder(name)
    raise InputError(
        f'{f.where}: the vision tower "{name}" is neither a folder next to the model nor in its '
        "weight files: give its folder with --vision-tower"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        return False


def tower_config(
    f: Fields, tower: Path | None, processor: Processor, tensors: Mapping[str, LazyTensor]
) -> ClipConfig:
    """Of the tower's own folder, or else of what the model's config.json (`f`) says of it.

    An EVA in the model's own files (`tensors`) says it by its tensors.
    """
    if tower is None and eva.is_eva(tensors):
        # Of all layers, whatever the first field says (LLaMA-VID's code).
        f.get("mm_vision_select_layer", int, None)
        f.only("mm_vision_select_feature", "patch", because="the class token is an image's token")
        return eva.config(tensors, f.where, processor)
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

    `select_feature` in LLaVA's words or in transformers' ("default", "full"). Images are made
    with `processor`'s filter, and normalised with its mean and deviation.
    """
    f, kind = _vision_fields(values, where)
    f.only("num_channels", 3, because="images have other channels than red, green and blue")
    f.only("pruned_heads", {}, because="attention heads were cut out")
    f.only("is_encoder_decoder", False, because="the model has its own kind of encoder")
    f.only("add_cross_attention", False, because="the model has cross-attention")
    f.only("tie_encoder_decoder", False, because="the model has its own kind of encoder")
    config = ClipConfig(
        image_size=f.size("image_size"),
        patch_size=f.size("patch_size"),
        width=f.size("hidden_size"),
        mlp_width=f.size("intermediate_size"),
        layers=f.size("num_hidden_layers"),
        heads=f.size("num_attention_heads"),
        norm_eps=f.positive("layer_norm_eps"),
        activation=f.get("hidden_act", str),
        **kind.own,
        select_layer=select_layer,
        select_feature=_feature(select_feature, kind.own["class_token"], where),
        resample=processor.resample,
        mean=processor.mean,
        std=processor.std,
    )
    f.finish(kind.harmless)
    return config


def _feature(said: str, class_token: bool, where: str) -> str:
    """ "patch" where all patches are read, and nothing else; other words as they are."""
    if said == "default" and not class_token:
        raise InputError(
            f'{where}: vision_feature_select_strategy "default" leaves out the first position,'
            ' which is a patch in a tower without a class token; only "full" is supported for it'
        )
    whole = "default" if class_token else "full"
    return "patch" if said == whole else said


def _vision_fields(values: dict[str, Any], where: str) -> tuple[Fields, _Kind]:
    """(the fields that describe the tower, whose it is); InputError for what is neither's."""
    f = Fields(values, where)
    name = f.get("model_type", str, "clip" if "vision_config" in values else "clip_vision_model")
    if name not in TYPES:
        flexible = " (NaFlex: as many patches as an image needs)" if "siglip2" in name else ""
        raise InputError(
            f'{where}: a vision tower of model_type "{name}"{flexible} is not supported; use a CLIP'
            f" or a SigLIP of a fixed resolution ({', '.join(TYPES)})"
        )
    if name in _WHOLE:
        nested = f.get("vision_config", dict)
        if name == "clip":
            _refuse_override(f, nested)
        f = Fields(nested, f"{where}: vision_config")
        f.only("model_type", f"{name}_vision_model", name, because="the tower is of another type")
    f.defaults = TYPES[name].defaults
    if f.size("hidden_size") % f.size("num_attention_heads"):
        raise InputError(
            f"{f.where}: hidden_size {f.size('hidden_size')} is not a multiple of"
            f" num_attention_heads {f.size('num_attention_heads')}"
        )
    if f.size("image_size") < f.size("patch_size"):
        raise InputError(
            f"{f.where}: image_size {f.size('image_size')} is below patch_size"
            f" {f.size('patch_size')}: there would be no patch"
        )
    return f, TYPES[name]


def _refuse_override(f: Fields, nested: dict[str, Any]) -> None:
    """Old files of full CLIPs also have `vision_config_dict`, which wins over `vision_config`."""
    for name, value in f.get("vision_config_dict", dict, {}).items():
        if name not in _CLIP.defaults or value is None:
            continue
        if value != (other := nested.get(name, _CLIP.defaults[name])):
            raise InputError(
                f'{f.where}: "vision_config" and "vision_config_dict" contradict each other in'
                f' "{name}" ({other!r}, {value!r}); remove the wrong one'
            )
