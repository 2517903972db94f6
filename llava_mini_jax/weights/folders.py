"""Model folders: which published format a folder has, its configuration, and where its tensors are.

llava-mini release   config.json (llava_mini_llama), tower embedded or in its own folder
LLaVA-1.5            config.json (llava_llama) with the tower in its own folder
llava-hf             config.json with text_config and vision_config, everything in one folder
our export           the release's format, and the section "llava_mini_jax" in config.json
                                   |
           open_model(folder) --> Bundle (configuration) + Published tensors
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.json_fields import SECTION, Fields, described_in, read_json
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights import hf_config, hf_fields, names
from llava_mini_jax.weights.hf_processor import (
    Processor,
    image_config,
    image_settings,
    read_processor,
)
from llava_mini_jax.weights.hf_prompt import eos_ids, template_of
from llava_mini_jax.weights.hub import expanded, resolve_folder
from llava_mini_jax.weights.import_hf import Published

# Published towers whose configuration is known without their folder.
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": configs.CLIP_L_336}

Tensors = Mapping[str, LazyTensor]


def open_model(
    folder: Path, *, vision_tower: Path | None = None, compute_dtype: str
) -> tuple[Bundle, list[Published]]:
    """The configuration of a model folder and its tensors, none of them read yet.

    `vision_tower` overrides where the tower is looked for; otherwise it is the embedded copy, or
    the folder that `mm_vision_tower` names (as it stands, or beside the model folder).
    Raises InputError for what is missing, damaged, or not a model of this code, and for every field
    of config.json that may change what the model computes and is not known.
    """
    f = _config_of(folder)
    tensors = open_tensors(folder)
    with described_in(f.where):
        kind = hf_config.check_kind(f, hf_config.LLAVA_TYPES)
        if kind == "llava" and "text_config" in f.values:
            return _open_llava_hf(folder, f, tensors, compute_dtype)
        return _open_llava(folder, f, kind, tensors, vision_tower, compute_dtype)


def _config_of(folder: Path) -> Fields:
    """The fields of a folder's config.json; quantized weights and adapters end here."""
    values, where = read_json(folder / "config.json"), str(folder / "config.json")
    hf_config.refuse_quantized(values, where)
    for name, what in hf_fields.FOREIGN_FILES.items():
        if (folder / name).is_file():
            raise InputError(f"{folder} holds {name}: {what}")
    return Fields(values, where)


def _open_llava(
    folder: Path,
    f: Fields,
    kind: str,
    tensors: Tensors,
    vision_tower: Path | None,
    compute_dtype: str,
) -> tuple[Bundle, list[Published]]:
    hf_config.refuse_other_llava(f)
    llm = hf_config.llama_from_hf(f, "mistral" if kind == "llava_mistral" else "llama")
    llm = _with_head(llm, tensors, names.LAYOUTS["release"])
    tower = _tower(folder, f, tensors, vision_tower)
    processor = read_processor(folder, tower)
    vision = _vision_config(f, tower, processor)
    grid = f.size("compressor_size", None)
    layers = f.get("prefusion_layer_num", int, 4)
    if layers < 0:
        raise f.wrong("prefusion_layer_num", "0 or more")
    model = configs.build(
        llm,
        vision,
        "release",
        compressor="none" if grid is None else None,
        grid=grid or 1,
        prefusion_layers=0 if grid is None else layers,
        projector=f.get("mm_projector_type", str, "linear"),
        compute_dtype=compute_dtype,
    )
    model = dataclasses.replace(model, detach_text=grid is not None)
    side = f.get("tokenizer_padding_side", str, "right")
    if side not in ("left", "right"):
        raise f.wrong("tokenizer_padding_side", '"left" or "right"')
    prompt = configs.prompt_config(
        "paper" if grid is None else "release",
        template_of(llm, folder, llava=True)[0],
        f.size("tokenizer_model_max_length", llm.max_positions),
        side,
    )
    bundle = Bundle(
        model=model,
        images=image_config(f, processor, vision.image_size),
        prompt=prompt,
        eos_ids=eos_ids(folder, f.values),
        pad_id=f.get("pad_token_id", int, 0),
    )
    if (section := f.get(SECTION, object, None)) is not None:
        bundle = _apply_section(bundle, section, f.where)
    f.finish(hf_fields.LLAVA_HARMLESS, hf_fields.TRAINING_NOTES)
    published = [_published(folder, tensors, "release")]
    if tower is not None and not _has_tower(tensors):
        published.append(_published(tower, open_tensors(tower), "clip"))
    return bundle, published


def _published(folder: Path, tensors: Tensors, layout: str) -> Published:
    return Published(str(folder), tensors, names.as_written(names.LAYOUTS[layout], tensors))


def _with_head(llm: LlamaConfig, tensors: Tensors, layout: names.Layout) -> LlamaConfig:
    """The configuration without `tied_head` where the files hold a head of its own, as fine-tunes
    do whose config.json was left behind: transformers uses that head too."""
    head = tensors.get(f"{layout.head}.weight")
    table = tensors.get(f"{layout.llm}embed_tokens.weight")
    if not llm.tied_head or head is None or table is None or same_numbers(head, table):
        return llm
    return dataclasses.replace(llm, tied_head=False)


def same_numbers(a: LazyTensor, b: LazyTensor, rows: int = 4096) -> bool:
    """Whether two matrices hold the same numbers; read a few rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    parts = (slice(row, row + rows) for row in range(0, a.shape[0], rows))
    return all((a.read((part,)) == b.read((part,))).all() for part in parts)


def open_parts(vision_tower: Path, llm: Path) -> tuple[ClipConfig, LlamaConfig, list[Published]]:
    """A training run's starting point: a CLIP folder and a LLaMA, Vicuna or Mistral folder."""
    f = _config_of(vision_tower)
    with described_in(f.where):
        vision = hf_config.clip_from_hf(
            f.values,
            f.where,
            select_layer=-2,
            select_feature="patch",
            processor=read_processor(vision_tower),
        )
    f, tensors = _config_of(llm), open_tensors(llm)
    with described_in(f.where):
        kind = hf_config.check_kind(f, hf_config.LLM_TYPES)
        language = hf_config.llama_from_hf(f, kind)
        f.finish(hf_fields.LLM_HARMLESS)
    language = _with_head(language, tensors, names.LAYOUTS["llama"])
    return (
        vision,
        language,
        [
            _published(vision_tower, open_tensors(vision_tower), "clip"),
            _published(llm, tensors, "llama"),
        ],
    )


def _open_llava_hf(
    folder: Path, f: Fields, tensors: Tensors, compute_dtype: str
) -> tuple[Bundle, list[Published]]:
    layout = "llava-hf-4.52" if _begins(tensors, "model.language_model.") else "llava-hf"
    f.only("projector_hidden_act", "gelu", because="the projector has another activation")
    f.only("multimodal_projector_bias", True, because="the projector has no biases")
    text = Fields(f.get("text_config", dict), f"{f.where}: text_config")
    kind = hf_config.check_kind(text, hf_config.LLM_TYPES, "llama")
    llm = hf_config.llama_from_hf(text, kind, nested=True)
    text.finish(hf_fields.LLM_HARMLESS)
    # Either level may say it.
    llm = dataclasses.replace(
        llm, tied_head=f.get("tie_word_embeddings", bool, False) or llm.tied_head
    )
    llm = _with_head(llm, tensors, names.LAYOUTS[layout])
    if words := Fields(f.get(SECTION, dict, {}), f"{f.where}: {SECTION}").size("vocab_size", None):
        llm = dataclasses.replace(llm, vocab_size=words)
        tensors = {name: _rows_of_words(tensor, words) for name, tensor in tensors.items()}
    processor = read_processor(folder)
    vision = hf_config.clip_from_hf(
        f.get("vision_config", dict),
        f"{f.where}: vision_config",
        select_layer=f.get("vision_feature_layer", int, -2),
        select_feature=f.get("vision_feature_select_strategy", str, "default"),
        processor=processor,
    )
    model = configs.build(
        llm, vision, "paper", compressor="none", prefusion_layers=0, compute_dtype=compute_dtype
    )
    bundle = Bundle(
        model=model,
        # This class's usual processor pads nothing: shortest side and centre crop.
        images=image_settings(processor, vision.image_size, pad=processor.pad, grid=1),
        prompt=configs.prompt_config(
            "paper", template_of(llm, folder, llava=True)[0], llm.max_positions
        ),
        eos_ids=eos_ids(folder, {**text.values, **f.values}),
        pad_id=f.get("pad_token_id", int, 0),
    )
    f.finish(hf_fields.LLAVA_HF_HARMLESS)
    return bundle, [_published(folder, tensors, layout)]


def _begins(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _rows_of_words(tensor: LazyTensor, words: int) -> LazyTensor:
    """A table of tokens without the row that our export adds for "<image>", others as they are."""
    if not tensor.name.endswith(names.TABLES) or tensor.shape[:1] <= (words,):
        return tensor
    return dataclasses.replace(tensor, shape=(words, *tensor.shape[1:]))


def _has_tower(tensors: Tensors) -> bool:
    prefix = names.LAYOUTS["release"].vision or ""
    return _begins(tensors, prefix.removesuffix(names.VISION_MODEL))


def _tower(folder: Path, f: Fields, tensors: Tensors, override: Path | None) -> Path | None:
    """The tower's own folder, or None where the model folder says all about it."""
    name = f.get("mm_vision_tower", str, "")
    if override is not None:
        return resolve_folder(override)
    for candidate in (folder / name, folder.parent / name, expanded(name)):
        if name and _is_file(candidate / "config.json"):
            return candidate
    known = name in KNOWN_TOWERS or f.values.get("vision_config") is not None
    if known and _has_tower(tensors):
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


def _vision_config(f: Fields, tower: Path | None, processor: Processor) -> ClipConfig:
    select_layer = f.get("mm_vision_select_layer", int, -2)
    feature = f.get("mm_vision_select_feature", str, "patch")
    found, source = f.get("vision_config", dict, None), f"{f.where}: vision_config"
    if tower is None and found is None:
        known = KNOWN_TOWERS[f.get("mm_vision_tower", str)]
        return dataclasses.replace(known, select_layer=select_layer, select_feature=feature)
    if tower is not None:
        own = _config_of(tower)
        found, source = own.values, own.where
    assert found is not None
    return hf_config.clip_from_hf(
        found, source, select_layer=select_layer, select_feature=feature, processor=processor
    )


def _apply_section(bundle: Bundle, section: Any, where: str) -> Bundle:
    """The switches that only our own exports write; an unknown one is an error."""
    if not isinstance(section, dict):
        raise InputError(f'{where}: "{SECTION}" is {section!r}, expected an object')
    parts = {"model": bundle.model, "prompt": bundle.prompt, "images": bundle.images}
    for part, changes in section.items():
        if part not in parts or not isinstance(changes, dict):
            raise InputError(
                f'{where}: "{SECTION}" has an unknown part "{part}"; known: {", ".join(parts)}'
            )
        for field, value in changes.items():
            _check_field(parts[part], field, value, f"{where}: {SECTION}.{part}")
        if "compressor" in changes:
            compressor = dataclasses.replace(bundle.model.compressor, **changes["compressor"])
            changes = {**changes, "compressor": compressor}
        parts[part] = dataclasses.replace(parts[part], **changes)
    return dataclasses.replace(bundle, **parts)


def _check_field(config: Any, field: str, value: Any, where: str) -> None:
    known = {f.name for f in dataclasses.fields(config)}
    if field not in known:
        raise InputError(
            f'{where} has the unknown field "{field}"; known: {", ".join(sorted(known))}'
        )
    current = getattr(config, field)
    if isinstance(value, dict) and dataclasses.is_dataclass(current):
        for inner, inner_value in value.items():
            _check_field(current, inner, inner_value, f"{where}.{field}")
    elif type(value) is not type(current):
        expected = type(current).__name__
        raise InputError(f"{where}.{field} is {short(value)}, expected {expected}; correct it")
    elif isinstance(value, int | float) and not 0 <= value < 2**31:
        raise InputError(f"{where}.{field} is {short(value)}, expected a number from 0 on")


def section_of(bundle: Bundle) -> dict[str, Any]:
    """What the release's own config.json fields cannot say about a bundle."""
    model = bundle.model
    return {
        "model": {
            "compressor": dataclasses.asdict(model.compressor),
            "compress": model.compress,
            "fuse_compressed": model.fuse_compressed,
            "detach_text": model.detach_text,
            "prefusion_layers": model.prefusion_layers,
            "inside_layers": model.inside_layers,
        },
        "prompt": dataclasses.asdict(bundle.prompt),
        "images": {
            "aspect": bundle.images.aspect,
            "split": bundle.images.split,
            "repeat_whole": bundle.images.repeat_whole,
        },
    }
