"""Parameters back into published folders: the inverse of import_hf, bit for bit.

    parameters --names.py--> (name, array), one tensor at a time --> safetensors shards + index
    Bundle --> config.json, generation_config.json, preprocessor_config.json

The release's layout holds every model of this code base; LLaVA-1.5's layouts hold those without
compressor and pre-fusion.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax import distributed
from llava_mini_jax import params as param_tree
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.text.conversation import IMAGE_MARK
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import SECTION
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import ParamSpec
from llava_mini_jax.tensorfiles.files import save_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.folders import KNOWN_TOWERS, section_of

FORMATS = ("release", "llava-1.5", "llava-hf")
TOKENIZER_FILES = (  # what data/text/tokenizer.py reads, by the beginnings of names
    *("tokenizer", "special_tokens_map", "added_tokens", "chat_template"),
    *("vocab.json", "merges.txt"),
)


def published_tensors(
    params: LlavaMini, cfg: LlavaMiniConfig, layout: names.Layout
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every parameter, or of every gradient, in a layout's names and shapes.

    Leaves that are None are left out. Raises InputError for a parameter that the layout lacks.
    """
    spec = llava_mini.spec(cfg)
    if isinstance(params.llm.layers, tuple):
        spec = llava_mini.unrolled(spec)
    table = names.table(layout, linear_projector=cfg.projector.kind == "linear")
    specs = param_tree.paths(spec)
    packed: dict[str, list[np.ndarray | None]] = {}
    for path, leaf in param_tree.paths(params, is_leaf=None).items():
        sources = names.sources(path, specs[path], table, cfg.vision.used_layers)
        if sources is None:
            raise InputError(f"this format has no tensor for {path}: export it as --format release")
        shape = _published_shape(specs[path])
        for i, source in enumerate(sources):
            array = distributed.fetch(leaf[i] if specs[path].stacked else leaf).reshape(shape)
            if source.parts == 1:
                yield source.name, array
                continue
            pieces = packed.setdefault(source.name, [None] * source.parts)
            pieces[source.part] = array
            if all(piece is not None for piece in pieces):
                yield source.name, np.concatenate(packed.pop(source.name))  # pyright: ignore
    assert not packed, f"incomplete packed tensors {sorted(packed)}"


def _published_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Our shape with every pair of axes (heads, head width) as one, and without the layer axis."""
    shape: list[int] = []
    axes: list[str | None] = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        if axis == "layers":
            continue
        if axes and axes[-1] == "heads" and axis is None:
            shape[-1] *= size
        else:
            shape.append(size)
        axes.append(axis)
    return tuple(shape)


def export_model(
    params: LlavaMini,
    bundle: Bundle,
    folder: Path,
    *,
    format: str = "release",
    tokenizer: Any = None,
    copy_from: Path | None = None,
) -> None:
    """Writes a complete model folder; nothing is left behind if it fails half-way.

    `copy_from`: a model folder whose tokenizer files are taken over unchanged.
    """
    if format not in FORMATS:
        raise InputError(f'format "{format}" is unknown; use one of {", ".join(FORMATS)}')
    if format != "release" and (
        bundle.model.compressor.kind != "none" or bundle.model.prefusion_layers
    ):
        raise InputError(
            f'format "{format}" has no place for compressor and pre-fusion: use --format release'
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another output folder")
    layout = names.LAYOUTS["llava-hf" if format == "llava-hf" else "release"]
    with _written_beside(folder) as work:
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        elif copy_from is not None:
            for path in copy_from.iterdir():
                if path.name.startswith(TOKENIZER_FILES) and path.is_file():
                    shutil.copy2(path, work)
                elif path.name == "additional_chat_templates" and path.is_dir():
                    shutil.copytree(path, work / path.name)
        tensors = published_tensors(params, bundle.model, layout)
        files = config_files(bundle, format)
        if format == "llava-hf" and any(work.glob("tokenizer*")):
            token = _add_image_token(work)
            files |= _with_image_token(files, bundle, token)
            tensors = _with_rows(tensors, token + 1)
        for name, content in files.items():
            (work / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tensors(work, tensors)


def gather_model(params: LlavaMini, bundle: Bundle) -> None:
    """The part of the other processes while the first one writes a release folder."""
    for _ in published_tensors(params, bundle.model, names.LAYOUTS["release"]):
        pass


@contextlib.contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, or disappears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def config_files(bundle: Bundle, format: str) -> dict[str, dict[str, Any]]:
    """The json files of a model folder, by file name."""
    model = bundle.model
    vision = _vision_json(model)
    llm = llama_json(model.llm)
    eos = list(bundle.eos_ids) if len(bundle.eos_ids) != 1 else bundle.eos_ids[0]
    ids = {"eos_token_id": eos, "pad_token_id": bundle.pad_id}
    if format == "llava-hf":
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {"model_type": "llama", **llm},
            "vision_config": vision,
            "vision_feature_layer": model.vision.select_layer,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "torch_dtype": model.compute_dtype,
            **ids,
        }
    else:
        compressed = model.compressor.kind != "none" or model.prefusion_layers > 0
        config = {
            "architectures": [
                "LlavaMiniLlamaForCausalLM" if compressed else "LlavaLlamaForCausalLM"
            ],
            "model_type": "llava_mini_llama" if compressed else "llava_llama",
            **llm,
            "mm_vision_tower": _tower_name(model.vision),
            "vision_config": vision,
            "mm_hidden_size": model.vision.width,
            "mm_projector_type": model.projector.kind,
            "mm_vision_select_layer": model.vision.select_layer,
            "mm_vision_select_feature": model.vision.select_feature,
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "image_aspect_ratio": "pad" if bundle.images.aspect == "pad" else "square",
            "resolution_ratio": bundle.images.grid,
            "tokenizer_model_max_length": bundle.prompt.max_length,
            "tokenizer_padding_side": bundle.prompt.padding_side,
            "torch_dtype": model.compute_dtype,
            **ids,
            SECTION: section_of(bundle),
        }
        if compressed:
            config |= {
                "compressor_size": model.compressor.grid,
                "prefusion_layer_num": model.prefusion_layers,
            }
    return {
        "config.json": config,
        "generation_config.json": ids,
        "preprocessor_config.json": _preprocessor_json(model)
        | (_PADDING if format == "llava-hf" and bundle.images.aspect == "pad" else {}),
    }


def _add_image_token(folder: Path) -> int:
    """The id of "<image>" in the folder's tokenizer, which has it from now on.

    transformers finds pictures by it; our prompts are cut at the word before they are tokenised.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def _with_image_token(
    files: dict[str, dict[str, Any]], bundle: Bundle, token: int
) -> dict[str, dict[str, Any]]:
    """What transformers needs to know of it; and how many tokens we had, for the way back."""
    config, vision = files["config.json"], bundle.model.vision
    words = bundle.model.llm.vocab_size
    return {
        "config.json": {
            **config,
            "text_config": {**config["text_config"], "vocab_size": max(words, token + 1)},
            "image_token_index": token,
            "image_seq_length": vision.grid**2,
            SECTION: {"vocab_size": words},
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_MARK,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,  # the tower's class token, which "default" drops
        },
    }


def _with_rows(
    tensors: Iterator[tuple[str, np.ndarray]], tokens: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tables of at least so many tokens: a row that is added is the mean, which is never said."""
    for name, array in tensors:
        missing = tokens - len(array) if name.endswith(names.TABLES) else 0
        if missing > 0:
            mean = array.mean(axis=0, keepdims=True, dtype=np.float32).astype(array.dtype)
            array = np.concatenate([array, np.repeat(mean, missing, axis=0)])
        yield name, array


def _tower_name(vision: ClipConfig) -> str:
    """What LLaVA's own code builds the tower by: it takes published names only. Here the embedded
    copy is read, whatever its name."""
    for name, known in KNOWN_TOWERS.items():
        if dataclasses.replace(known, select_layer=vision.select_layer) == vision:
            return name
    return "vision"


def llama_json(cfg: LlamaConfig) -> dict[str, Any]:
    scaling = None
    if cfg.rope.scaling is not None:
        scaling = {"rope_type": "llama3", **vars(cfg.rope.scaling)}
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied_head,
        "initializer_range": cfg.init_stddev,
    }


def _vision_json(model: LlavaMiniConfig) -> dict[str, Any]:
    vision = model.vision
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": vision.activation,
    }


# Squares of the mean colour first: transformers has a class of its own for that. In the other
# formats config.json says it (image_aspect_ratio).
_PADDING = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


def _preprocessor_json(model: LlavaMiniConfig) -> dict[str, Any]:
    size = model.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
    }
