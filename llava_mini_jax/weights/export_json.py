"""The json files of a published folder: the inverse of hf_config, towers and hf_processor.

Bundle --config_files--> {"config.json": .., "generation_config.json", "preprocessor_config.json"}
"""

import dataclasses
from typing import Any

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.media.images import FILTERS, ImageConfig
from llava_mini_jax.data.text.conversation import IMAGE_MARK
from llava_mini_jax.json_fields import SECTION
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors import GridConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.weights.families import FAMILIES, family_of, own_json
from llava_mini_jax.weights.hf_rope import rope_json
from llava_mini_jax.weights.own_section import section_of
from llava_mini_jax.weights.towers import KNOWN_TOWERS


def config_files(bundle: Bundle, format: str) -> dict[str, dict[str, Any]]:
    """The json files of a model folder, by file name; `format` is one of export_hf's FORMATS."""
    model, pads = bundle.model, bundle.images.aspect == "pad"
    eos = list(bundle.eos_ids) if len(bundle.eos_ids) != 1 else bundle.eos_ids[0]
    ids = {"eos_token_id": eos, "pad_token_id": bundle.pad_id}
    own = _llava_hf_json(model) if format == "llava-hf" else _release_json(bundle)
    # Squares of the mean colour first: transformers has a class of its own for that. In the other
    # formats config.json says it (image_aspect_ratio).
    padding = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {
        "config.json": {**own, "torch_dtype": model.compute_dtype, **ids},
        "generation_config.json": ids,
        "preprocessor_config.json": _preprocessor_json(bundle.images)
        | (padding if format == "llava-hf" and pads else {}),
    }


def _llava_hf_json(model: LlavaMiniConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"model_type": family_of(model.llm), **llama_json(model.llm)},
        "vision_config": _vision_json(model.vision),
        "vision_feature_layer": model.vision.select_layer,
        "vision_feature_select_strategy": _strategy(model.vision),
        "projector_hidden_act": "gelu",
    }


def _release_json(bundle: Bundle) -> dict[str, Any]:
    model = bundle.model
    family = family_of(model.llm)
    word = FAMILIES[family].word
    kind = {"architectures": [f"Llava{word}ForCausalLM"], "model_type": f"llava_{family}"}
    own = model.compressor
    # Another method's model has no fields of the release's: our own section says what it is.
    if isinstance(own, GridConfig) and (own.kind != "none" or model.prefusion_layers > 0):
        kind = {
            "architectures": [f"LlavaMini{word}ForCausalLM"],
            "model_type": f"llava_mini_{family}",
            "compressor_size": own.grid,
            "prefusion_layer_num": model.prefusion_layers,
        }
    return {
        **kind,
        **llama_json(model.llm),
        "mm_vision_tower": _tower_name(model.vision),
        "vision_config": _vision_json(model.vision),
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
        SECTION: section_of(bundle),
    }


def with_image_token(
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
            "vision_feature_select_strategy": _strategy(vision),
            # The tower's class token, which "default" drops.
            "num_additional_image_tokens": int(vision.class_token),
        },
    }


def _tower_name(vision: ClipConfig) -> str:
    """What LLaVA's own code builds the tower by: it takes published names only. Here the embedded
    copy is read, whatever its name."""
    for name, known in KNOWN_TOWERS.items():
        if dataclasses.replace(known, select_layer=vision.select_layer) == vision:
            return name
    return "vision"


def llama_json(cfg: LlamaConfig) -> dict[str, Any]:
    """The fields of a language model, of whichever family it is (`family_of`)."""
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
        **rope_json(cfg.rope),
        **own_json(cfg),
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied_head,
        "initializer_range": cfg.init_stddev,
    }


def _strategy(vision: ClipConfig) -> str:
    """All patches, in the words of transformers' LLaVA."""
    return "default" if vision.class_token else "full"


def _vision_json(vision: ClipConfig) -> dict[str, Any]:
    kind = {"model_type": "clip_vision_model" if vision.pre_norm else "eva_vision_model"}
    if not vision.class_token:
        # Without the pooling head, which is not kept.
        kind = {"model_type": "siglip_vision_model", "vision_use_head": False}
    return {
        **kind,
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": vision.activation,
    }


def _preprocessor_json(images: ImageConfig) -> dict[str, Any]:
    both = {"height": images.size, "width": images.size}
    steps = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": images.size},
        "do_center_crop": True,
        "crop_size": both,
    }
    if images.aspect == "squeeze":
        steps = {"image_processor_type": "SiglipImageProcessor", "size": both}
    return {
        **steps,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(FILTERS[images.resample]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
