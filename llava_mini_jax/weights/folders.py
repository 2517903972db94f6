"""Model folders: which published format a folder has, its configuration, and where its tensors are.

llava-mini release   config.json (llava_mini_llama), tower embedded or in its own folder
LLaVA-1.5            config.json (llava_llama) with the tower in its own folder
llava-hf             config.json with text_config and vision_config, everything in one folder
our export           the release's format, and the section "llava_mini_jax" in config.json
                                   |
           open_model(folder) --> Bundle (configuration) + Published tensors
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle, Fields
from llava_mini_jax.data.images import image_config_from_hf
from llava_mini_jax.data.tokenizer_files import chat_template_of
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.weights import import_hf, names
from llava_mini_jax.weights.files import open_tensors
from llava_mini_jax.weights.hub import expanded, resolve_folder
from llava_mini_jax.weights.import_hf import Published
from llava_mini_jax.weights.lazy_tensor import LazyTensor

SECTION = "llava_mini_jax"  # our own section of config.json

# Published towers whose configuration is known without their folder.
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": configs.CLIP_L_336}


def open_model(
    folder: Path, *, vision_tower: Path | None = None, compute_dtype: str, dialect: str = "release"
) -> tuple[Bundle, list[Published]]:
    """The configuration of a model folder and its tensors, none of them read yet.

    `vision_tower` overrides where the tower is looked for; otherwise it is the embedded copy, or
    the folder that `mm_vision_tower` names (as it stands, or beside the model folder).
    Raises InputError for what is missing, damaged, or not a model of this code.
    """
    values = configs.read_json(folder / "config.json")
    where = str(folder / "config.json")
    tensors = open_tensors(folder)
    with _described_in(where):
        if "text_config" in values:
            return _open_llava_hf(folder, values, where, tensors, compute_dtype)
        return _open_llava(folder, values, where, tensors, vision_tower, compute_dtype, dialect)


@contextlib.contextmanager
def _described_in(where: str) -> Iterator[None]:
    """What a part's own configuration raises, as a sentence about the file."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where} does not describe a model: {error}") from error


def _open_llava(
    folder: Path,
    values: dict[str, Any],
    where: str,
    tensors: Mapping,
    vision_tower: Path | None,
    compute_dtype: str,
    dialect: str,
) -> tuple[Bundle, list[Published]]:
    f = Fields(values, where)
    if f.get("mm_use_im_start_end", bool, False):
        raise InputError(
            f'{where}: "mm_use_im_start_end" is true, but pictures between <im_start> and <im_end>'
            " are not supported; only models trained without these tokens can be used"
        )
    llm = configs.llama_from_hf(values, where)
    tower = _tower(folder, values, where, tensors, vision_tower)
    select_layer = f.get("mm_vision_select_layer", int, -2)
    preprocessor = _preprocessor(folder, tower)
    vision = _vision_config(values, where, tower, select_layer, preprocessor)
    compressed = values.get("compressor_size") is not None
    model = configs.build(
        llm,
        vision,
        dialect,
        compressor=None if compressed else "none",
        grid=f.get("compressor_size", int, 1),
        prefusion_layers=f.get("prefusion_layer_num", int, 4) if compressed else 0,
        projector=f.get("mm_projector_type", str, "linear"),
        compute_dtype=compute_dtype,
    )
    model = dataclasses.replace(model, detach_text=compressed)
    prompt = configs.prompt_config(
        "release" if compressed else "paper",
        template_of(llm, folder, llava=True)[0],
        f.get("tokenizer_model_max_length", int, llm.max_positions),
        "left" if values.get("tokenizer_padding_side") == "left" else "right",
    )
    bundle = Bundle(
        model=model,
        images=dataclasses.replace(
            image_config_from_hf(values, preprocessor), size=vision.image_size
        ),
        prompt=prompt,
        eos_ids=eos_ids(folder, values),
        pad_id=f.get("pad_token_id", int, 0),
    )
    if SECTION in values:
        bundle = _apply_section(bundle, values[SECTION], where)
    published = [Published(str(folder), tensors, names.LAYOUTS["release"])]
    if tower is not None and not _has_tower(tensors):
        published.append(Published(str(tower), open_tensors(tower), names.LAYOUTS["clip"]))
    return bundle, published


def load_params(
    bundle: Bundle,
    published: Iterable[Published],
    *,
    dtype: Any,
    int8: bool = False,
    unrolled: bool,
    fresh: Iterable[str] = (),
    key: jax.Array | None = None,
) -> LlavaMini:
    """Parameters from published tensors, with layers stacked (training) or unrolled (inference).

    `int8`: weights of products as int8, everything else in `dtype`.
    """
    spec = llava_mini.spec(bundle.model)
    return import_hf.load(
        llava_mini.unrolled(spec) if unrolled else spec,
        published,
        read_vision_layers=bundle.model.vision.read_layers,
        linear_projector=bundle.model.projector.kind == "linear",
        dtype=jnp.dtype(dtype),
        int8=int8,
        fresh=fresh,
        key=key,
    )


def open_parts(
    vision_tower: Path, llm: Path
) -> tuple[configs.ClipConfig, configs.LlamaConfig, list[Published]]:
    """A training run's starting point: a CLIP folder and a LLaMA or Vicuna folder."""
    where = str(vision_tower / "config.json")
    with _described_in(where):
        vision = configs.clip_from_hf(
            configs.read_json(vision_tower / "config.json"),
            where,
            select_layer=-2,
            select_feature="patch",
            preprocessor=_preprocessor(vision_tower, None),
        )
    where = str(llm / "config.json")
    with _described_in(where):
        language = configs.llama_from_hf(configs.read_json(llm / "config.json"), where)
    return (
        vision,
        language,
        [
            Published(str(vision_tower), open_tensors(vision_tower), names.LAYOUTS["clip"]),
            Published(str(llm), open_tensors(llm), names.LAYOUTS["llama"]),
        ],
    )


def _open_llava_hf(
    folder: Path, values: dict[str, Any], where: str, tensors: Mapping, compute_dtype: str
) -> tuple[Bundle, list[Published]]:
    f = Fields(values, where)
    llm = configs.llama_from_hf(f.get("text_config", dict), f"{where}: text_config", nested=True)
    if words := Fields(f.get(SECTION, dict, {}), f"{where}: {SECTION}").get("vocab_size", int, 0):
        llm = dataclasses.replace(llm, vocab_size=words)
        tensors = {name: _rows_of_words(tensor, words) for name, tensor in tensors.items()}
    strategy = f.get("vision_feature_select_strategy", str, "default")
    preprocessor = _preprocessor(folder, None)
    vision = configs.clip_from_hf(
        f.get("vision_config", dict),
        f"{where}: vision_config",
        select_layer=f.get("vision_feature_layer", int, -2),
        select_feature=strategy,
        preprocessor=preprocessor,
    )
    model = configs.build(
        llm, vision, "paper", compressor="none", prefusion_layers=0, compute_dtype=compute_dtype
    )
    bundle = Bundle(
        model=model,
        # This class's own processor pads nothing: shortest side and centre crop.
        images=dataclasses.replace(image_config_from_hf({}, preprocessor), size=vision.image_size),
        prompt=configs.prompt_config(
            "paper", template_of(llm, folder, llava=True)[0], llm.max_positions
        ),
        eos_ids=eos_ids(folder, {**f.get("text_config", dict), **values}),
        pad_id=f.get("pad_token_id", int, 0),
    )
    new = any(name.startswith("model.language_model.") for name in tensors)
    layout = names.LAYOUTS["llava-hf-4.52" if new else "llava-hf"]
    return bundle, [Published(str(folder), tensors, layout)]


def _rows_of_words(tensor: LazyTensor, words: int) -> LazyTensor:
    """A table of tokens without the row that our export adds for "<image>", others as they are."""
    if not tensor.name.endswith(names.TABLES) or tensor.shape[:1] <= (words,):
        return tensor
    return dataclasses.replace(tensor, shape=(words, *tensor.shape[1:]))


def _has_tower(tensors: Mapping[str, Any]) -> bool:
    prefix = names.LAYOUTS["release"].vision or ""
    return any(name.startswith(prefix) for name in tensors)


def _tower(
    folder: Path, values: dict[str, Any], where: str, tensors: Mapping, override: Path | None
) -> Path | None:
    """The tower's own folder, or None where the model folder says all about it."""
    if override is not None:
        return resolve_folder(override)
    name = Fields(values, where).get("mm_vision_tower", str, "")
    for candidate in (folder / name, folder.parent / name, expanded(name)):
        if name and (candidate / "config.json").is_file():
            return candidate
    known = name in KNOWN_TOWERS or "vision_config" in values
    if known and _has_tower(tensors):
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return resolve_folder(name)
    raise InputError(
        f'{where}: the vision tower "{name}" is neither a folder beside the model nor in its '
        "weight files: give its folder with --vision-tower"
    )


def _vision_config(
    values: dict[str, Any],
    where: str,
    tower: Path | None,
    select_layer: int,
    preprocessor: dict[str, Any] | None,
) -> configs.ClipConfig:
    feature = values.get("mm_vision_select_feature", "patch")
    name = values.get("mm_vision_tower", "")
    if tower is None and "vision_config" not in values:
        return dataclasses.replace(
            KNOWN_TOWERS[name], select_layer=select_layer, select_feature=feature
        )
    found, source = values.get("vision_config"), where
    if tower is not None:
        source = str(tower / "config.json")
        found = configs.read_json(tower / "config.json")
    assert found is not None
    return configs.clip_from_hf(
        found,
        source,
        select_layer=select_layer,
        select_feature=feature,
        preprocessor=preprocessor,
    )


def _preprocessor(*folders: Path | None) -> dict[str, Any] | None:
    for folder in folders:
        if folder is not None and (folder / "preprocessor_config.json").is_file():
            return configs.read_json(folder / "preprocessor_config.json")
    return None


def eos_ids(folder: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: generation_config.json's, else config.json's."""
    path, name = folder / "generation_config.json", "eos_token_id"
    found = configs.read_json(path).get(name) if path.is_file() else None
    if found is None:
        path, found = folder / "config.json", values.get(name)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise InputError(
                f'{path}: "{name}" is {found!r:.80}, expected a token\'s id or a list of them;'
                " correct it"
            )
    return tuple(dict.fromkeys(ids))


def template_of(llm: configs.LlamaConfig, folder: Path, *, llava: bool) -> tuple[str, str]:
    """The prompts' template of a model, and why, for no config.json says it.

    Recognised are LLaMA-3.1 (its rope scaling) and LLaMA-3 (its theta), as the release tells them
    apart, unless the folder's own chat template is another one; and LLaVA's models of Vicuna. All
    others speak as their tokenizer's chat template does, or, without one, as Vicuna.
    `llava`: the folder is that of a LLaVA, not of a language model alone.
    """
    own = chat_template_of(folder)
    if own is None or "<|start_header_id|>" in own:
        if llm.rope.scaling is not None:
            return "llama_3_1", "the language model is a LLaMA-3.1, by its rope scaling"
        if llm.rope.theta == configs.LLAMA_3_1_8B.rope.theta:
            return "llama_3", "the language model is a LLaMA-3, by its rope_theta"
    vicuna = llm.rope == configs.VICUNA_7B.rope
    if llava and vicuna:
        return "vicuna_v1", "the language model is a Vicuna, by its rope_theta"
    if own is not None:
        return "chat", "the language model is none of those known here; its own chat template"
    if vicuna:
        return "vicuna_v1", "the language model has Vicuna's rope_theta, and no chat template"
    return "vicuna_v1", "a guess: the language model is not known, and has no chat template"


def template_told(bundle: Bundle, folder: Path, *, llava: bool = True) -> str:
    """A line for people: which template the prompts of a folder have, and why."""
    section = configs.read_json(folder / "config.json").get(SECTION)
    own = section.get("prompt") if isinstance(section, dict) else None
    if isinstance(own, dict) and "template" in own:
        why = "its config.json says so"
    else:
        why = template_of(bundle.model.llm, folder, llava=llava)[1]
    return f"template of prompts: {bundle.prompt.template} ({why})"


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
        raise InputError(f"{where}.{field} is {value!r}, expected {expected}; correct it")


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
