"""Model folders: which published format a folder has, its configuration, and where its tensors are.

llava-mini release   config.json (llava_mini_llama), tower embedded or in its own folder
LLaVA-1.5            config.json (llava_llama) with the tower in its own folder
other methods' LLaVA the same, with a compressor of theirs (methods.py)
llava-hf             config.json with text_config and vision_config, everything in one folder
our export           the release's format, and the section "llava_mini_jax" in config.json
an adapter of these  adapter_config.json: base and change as one (adapters.py)
codes of 4 bits      quantization_config of AWQ or GPTQ: read as weights (packed.py)
                                   |
           open_model(folder) --> Bundle (configuration) + Published tensors
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import SECTION, Fields, described_in
from llava_mini_jax.models import compressors
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights import adapters, eva, hf_config, hf_fields, methods, names, towers
from llava_mini_jax.weights.codes import coded
from llava_mini_jax.weights.codes_config import coding_of
from llava_mini_jax.weights.hf_processor import image_config, image_settings, read_processor
from llava_mini_jax.weights.hf_prompt import eos_ids, template_of
from llava_mini_jax.weights.import_hf import Published
from llava_mini_jax.weights.method_folders import PUBLISHED, Source
from llava_mini_jax.weights.own_section import with_section

Tensors = Mapping[str, LazyTensor]


def open_model(
    folder: Path,
    *,
    vision_tower: Path | None = None,
    base: Path | None = None,
    compressor: methods.Asked | None = None,
    compute_dtype: str,
) -> tuple[Bundle, list[Published]]:
    """The configuration of a model folder and its tensors, none of them read yet.

    An adapter's folder is read merged with its base: `base`, or the one that it names.
    `vision_tower` overrides where the tower is looked for; otherwise it is the embedded copy, or
    the folder that `mm_vision_tower` names (as it stands, or beside the model folder).
    `compressor` gives a LLaVA a method that needs no training, or options to the folder's own.
    Raises InputError for what is missing, damaged, or not a model of this code, and for every field
    of config.json that may change what the model computes and is not known.
    """
    adapter = adapters.open_adapter(folder, base) if adapters.is_adapter(folder) else None
    if adapter is None and base is not None:
        raise InputError(f"{folder} is a whole model, not an adapter: leave out --base")
    tensors = open_tensors(folder) if adapter is None else adapter.tensors()
    folder = folder if adapter is None else adapter.described
    f = hf_config.config_fields(folder, coded=True)
    with described_in(f.where):
        tensors = coded(tensors, coding_of(f, folder))
        kind = hf_config.check_kind(f, hf_config.LLAVA_TYPES)
        if kind == "llava" and "text_config" in f.values:
            return _open_llava_hf(folder, f, tensors, compressor, compute_dtype)
        return _open_llava(folder, f, tensors, vision_tower, compressor, compute_dtype)


def open_parts(vision_tower: Path, llm: Path) -> tuple[ClipConfig, LlamaConfig, list[Published]]:
    """A training run's starting point: the folder of a tower, or of a LLaVA whose tower is taken,
    and that of a language model."""
    vision, tower = _open_tower(vision_tower)
    f = hf_config.config_fields(llm, coded=True)
    with described_in(f.where):
        tensors = coded(open_tensors(llm), coding_of(f, llm))
        kind = hf_config.check_kind(f, hf_config.LLM_TYPES)
        language = hf_config.llama_from_hf(f, kind)
        f.finish(hf_fields.LLM_HARMLESS)
    language = _with_head(language, tensors, names.LAYOUTS["llama"])
    return vision, language, [tower, _published(llm, tensors, "llama")]


def _open_tower(folder: Path) -> tuple[ClipConfig, Published]:
    f = hf_config.config_fields(folder)
    if f.get("model_type", str, "").startswith("llava"):
        bundle, published = open_model(folder, compute_dtype="float32")
        own = published[-1]  # the model's own files, or its tower's folder
        start = own.layout.vision or ""
        tensors = {name: own.tensors[name] for name in own.tensors if name.startswith(start)}
        tower = Published(own.where, tensors, names.Layout(vision=own.layout.vision))
        return bundle.model.vision, tower
    with described_in(f.where):
        processor = read_processor(folder)
        vision = towers.clip_from_hf(
            f.values, f.where, select_layer=-2, select_feature="patch", processor=processor
        )
    return vision, _published(folder, open_tensors(folder), "clip")


def _open_llava(
    folder: Path,
    f: Fields,
    tensors: Tensors,
    vision_tower: Path | None,
    asked: methods.Asked | None,
    compute_dtype: str,
) -> tuple[Bundle, list[Published]]:
    hf_config.refuse_other_llava(f)
    kind = f.get("model_type", str).removeprefix("llava").removeprefix("_mini").removeprefix("_")
    llm = _with_head(hf_config.llama_from_hf(f, kind or "llama"), tensors, names.LAYOUTS["release"])
    tower = towers.find_tower(folder, f, tensors, vision_tower)
    processor = read_processor(folder, tower)
    vision = towers.tower_config(f, tower, processor, tensors)
    if tower is None and eva.is_eva(tensors):
        tensors = eva.as_clip(tensors)
    bundle = Bundle(
        model=_llava_model(f, llm, vision, compute_dtype),
        images=image_config(f, processor, vision.image_size),
        prompt=_llava_prompt(f, llm, folder),
        eos_ids=eos_ids(folder, f.values),
        pad_id=f.get("pad_token_id", int, 0),
    )
    bundle = _with_method(with_section(bundle, f), folder, f, tensors, asked)
    f.finish(hf_fields.LLAVA_HARMLESS, hf_fields.TRAINING_NOTES)
    published = [_published(folder, tensors, "release")]
    if tower is not None and not towers.has_tower(tensors):
        published.append(_published(tower, open_tensors(tower), "clip"))
    return bundle, published


def _llava_model(
    f: Fields, llm: LlamaConfig, vision: ClipConfig, compute_dtype: str
) -> LlavaMiniConfig:
    """Without `compressor_size` it is a LLaVA-1.5, as the release's own code has it."""
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
    return dataclasses.replace(model, detach_text=grid is not None)


def _llava_prompt(f: Fields, llm: LlamaConfig, folder: Path) -> PromptConfig:
    side = f.get("tokenizer_padding_side", str, "right")
    if side not in ("left", "right"):
        raise f.wrong("tokenizer_padding_side", '"left" or "right"')
    return configs.prompt_config(
        "paper" if f.size("compressor_size", None) is None else "release",
        template_of(llm, folder, llava=True)[0],
        f.size("tokenizer_model_max_length", llm.max_positions),
        side,
    )


def _with_method(
    bundle: Bundle, folder: Path, f: Fields, tensors: Tensors, asked: methods.Asked | None
) -> Bundle:
    """The bundle with the compressor that the folder was trained with, or that is asked for."""
    model, has_section = bundle.model, SECTION in f.values
    words = {} if has_section else methods.own_words(folder)
    if model.compressor.kind != "none" or model.prefusion_layers or model.inside_layers:
        kind = model.compressor.kind
        methods.refuse_other(f.where, kind if kind in PUBLISHED else "LLaVA-Mini's", asked)
        compressor = methods.with_options(model.compressor, asked, model.vision)
        return dataclasses.replace(bundle, model=dataclasses.replace(model, compressor=compressor))
    said = None if has_section else methods.said_by(f, tensors, words)
    methods.refuse_other(f.where, said, asked)
    kind = said or (asked.kind if asked is not None else None)
    if kind is None:
        return bundle
    source = Source(f, tensors, model.vision, model.llm, words)
    compressor = methods.compressor_of(kind, source, asked)
    if bundle.images.grid > 1 and not compressors.declare(compressor).parts:
        raise f.wrong("resolution_ratio", f"1, because {kind} is defined on whole images")
    placed = configs.build(
        model.llm,
        model.vision,
        "release",
        compressor=compressor,
        prefusion_layers=0,
        projector=model.projector.kind,
        compute_dtype=model.compute_dtype,
    )
    model = dataclasses.replace(placed, detach_text=False)
    template = PUBLISHED[kind].template or bundle.prompt.template
    return dataclasses.replace(
        bundle, model=model, prompt=dataclasses.replace(bundle.prompt, template=template)
    )


def _open_llava_hf(
    folder: Path, f: Fields, tensors: Tensors, asked: methods.Asked | None, compute_dtype: str
) -> tuple[Bundle, list[Published]]:
    nested = any(name.startswith("model.language_model.") for name in tensors)
    layout = "llava-hf-4.52" if nested else "llava-hf"
    f.only("projector_hidden_act", "gelu", because="the projector has another activation")
    f.only("multimodal_projector_bias", True, because="the projector has no biases")
    llm = _with_head(_text_model(f), tensors, names.LAYOUTS[layout])
    if words := Fields(f.get(SECTION, dict, {}), f"{f.where}: {SECTION}").size("vocab_size", None):
        llm = dataclasses.replace(llm, vocab_size=words)
        tensors = {name: _rows_of_words(tensor, words) for name, tensor in tensors.items()}
    processor = read_processor(folder)
    vision = towers.clip_from_hf(
        f.get("vision_config", dict),
        f"{f.where}: vision_config",
        select_layer=f.get("vision_feature_layer", int, -2),
        select_feature=f.get("vision_feature_select_strategy", str, "default"),
        processor=processor,
    )
    bundle = Bundle(
        model=configs.build(
            llm, vision, "paper", compressor="none", prefusion_layers=0, compute_dtype=compute_dtype
        ),
        # This class's usual processor pads nothing: shortest side and centre crop.
        images=image_settings(processor, vision.image_size, pad=processor.pad, grid=1),
        prompt=configs.prompt_config(
            "paper", template_of(llm, folder, llava=True)[0], llm.max_positions
        ),
        eos_ids=eos_ids(folder, {**f.get("text_config", dict), **f.values}),
        pad_id=f.get("pad_token_id", int, 0),
    )
    bundle = _with_method(bundle, folder, f, tensors, asked)
    f.finish(hf_fields.LLAVA_HF_HARMLESS)
    return bundle, [_published(folder, tensors, layout)]


def _text_model(f: Fields) -> LlamaConfig:
    text = Fields(f.get("text_config", dict), f"{f.where}: text_config")
    kind = hf_config.check_kind(text, hf_config.LLM_TYPES, "llama")
    llm = hf_config.llama_from_hf(text, kind, nested=True)
    text.finish(hf_fields.LLM_HARMLESS)
    tied = f.get("tie_word_embeddings", bool, False) or llm.tied_head  # either level may say it
    return dataclasses.replace(llm, tied_head=tied)


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


def _rows_of_words(tensor: LazyTensor, words: int) -> LazyTensor:
    """A table of tokens without the row that our export adds for "<image>", others as they are."""
    if not tensor.name.endswith(names.TABLES) or tensor.shape[:1] <= (words,):
        return tensor
    return dataclasses.replace(tensor, shape=(words, *tensor.shape[1:]))
