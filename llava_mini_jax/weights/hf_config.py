"""Hugging Face's config.json of language models, into this package's configuration.

    folder --config_fields--> Fields --llama_from_hf--> LlamaConfig

Many models share LLaMA's tensor names and compute something else: scaled residuals, biases, norms,
a window, capped logits. So the model's type must be one of `LLM_TYPES`, whose own fields are read
in families.py and hf_rope.py, and others that change the arithmetic must have the one value that is
computed here. What each field means was read from transformers 5.24's classes.
"""

import math
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.weights import codes_config, hf_fields
from llava_mini_jax.weights.families import FAMILIES, own_fields
from llava_mini_jax.weights.hf_rope import rope_from_hf

LLM_TYPES = tuple(FAMILIES)
_MOST_LAYERS = 10_000  # lists of what each layer is are made before anything is read
# "llava_qwen" and others are LLaVA-NeXT's names, whose models are not LLaVA-1.5's.
LLAVA_TYPES = (
    "llava",
    *(f"{front}_{kind}" for front in ("llava_mini", "llava") for kind in FAMILIES),
)
# A class name says what a model_type may hide: a reward model, a fork with layers of its own.
ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaLlamaAttForCausalLM",  # LLaMA-VID's
    *(
        f"{front}{family.word}ForCausalLM"
        for front in ("", "LlavaMini", "Llava")
        for family in FAMILIES.values()
    ),
)


def config_fields(folder: Path, *, coded: bool = False) -> Fields:
    """The fields of a folder's config.json; quantized weights end here, but for those of
    codes_config.py where they may be `coded`."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    refuse_quantized(values, where, coded)
    known = codes_config.BESIDE if coded and values.get(codes_config.FIELD) else ()
    for name, what in hf_fields.FOREIGN_FILES.items():
        if (folder / name).is_file() and name not in known:
            raise InputError(f"{folder} holds {name}: {what}")
    return Fields(values, where)


def refuse_quantized(values: dict[str, Any], where: str, coded: bool = False) -> None:
    """Codes of fewer bits are no numbers until they meet their scales, and those lie anywhere."""
    for place in (values, values.get("text_config"), values.get("vision_config")):
        for name in (codes_config.FIELD, "compression_config", "quantization"):
            found = place.get(name) if isinstance(place, dict) else None
            if not found:
                continue
            how = found.get("quant_method") if isinstance(found, dict) else found
            known = place is values and name == codes_config.FIELD and how in codes_config.METHODS
            if coded and known and isinstance(found, dict):
                continue
            raise InputError(
                f'{where} has "{name}" ({how or "of an unknown method"}): quantized weights cannot'
                f" be read, but for a decoder's of {' and '.join(codes_config.METHODS)} in 4 bits;"
                " give the folder of the original model in float16, bfloat16 or float32 (--dtype"
                " int8 and int4 quantize while loading)"
            )


def check_kind(f: Fields, types: tuple[str, ...], default: str | None = None) -> str:
    """The model_type, one of `types`; architectures and code of its own must not contradict it."""
    kind = f.get("model_type", str, *([] if default is None else [default]))
    if kind not in types:
        raise InputError(
            f'{f.where}: model_type "{kind}" is not supported: its tensors may have the same names,'
            f" but it computes something else; models of type {', '.join(types)} can be used"
        )
    architectures = f.get("architectures", list, [])
    if strange := [name for name in architectures if name not in ARCHITECTURES]:
        raise InputError(
            f'{f.where}: "architectures" has {strange[0]!r}, which is not supported; known:'
            f" {', '.join(ARCHITECTURES)}"
        )
    code = f.get("auto_map", dict, {})
    if own := [name for name in code if name.startswith(("AutoConfig", "AutoModel"))]:
        raise InputError(
            f'{f.where}: "auto_map" says that the model has its own code ({own[0]}), which is'
            " not run here and may compute something else; remove the field if it does not"
        )
    return kind


def refuse_other_llava(f: Fields) -> None:
    """Fields with which models of LLaVA's family treat images in another way."""
    if f.get("mm_use_im_start_end", bool, False):
        raise InputError(
            f'{f.where}: "mm_use_im_start_end" is true, but images between <im_start> and'
            " <im_end> are not supported; only models trained without these tokens can be used"
        )
    if f.values.get("image_aspect_ratio") == "slice":
        raise InputError(
            f"{f.where}: field \"image_aspect_ratio\" is 'slice', but then images are cut into a"
            " grid of blocks with text between them (TokenPacker-HD's), which is not supported"
            " here; use a model of whole images"
        )
    f.only("mm_patch_merge_type", "flat", because="parts of images are merged (LLaVA-NeXT's)")
    f.only("mm_resampler_type", because="a resampler comes before the projector")
    # LLaVA-NeXT pools the frames of videos by these, whatever the resampler is.
    for name in ("mode", "stride", "out_channels"):
        f.only(f"mm_spatial_pool_{name}", because="frames of videos are pooled (LLaVA-NeXT's)")
    f.only("mm_newline_position", because="marks separate frames (LLaVA-Video's)")
    f.only("s2", False, because="the tower sees images at several scales")
    f.only("add_faster_video", False, because="videos are pooled (LLaVA-Video's)")
    f.only("add_time_instruction", False, because="prompts state the times of frames")
    f.only("use_mm_proj", True, because="there is no projector")


def llama_from_hf(f: Fields, kind: str, *, nested: bool = False) -> LlamaConfig:
    """LlamaConfig of the fields of a model of the family `kind`; `nested`: of a text_config, from
    which transformers leaves defaults out. The caller ends with `f.finish(hf_fields.LLM_HARMLESS)`.
    """
    family = FAMILIES[kind]
    if nested:
        f.defaults = family.sizes
    heads, width = f.size("num_attention_heads"), f.size("hidden_size")
    head_width = family.head_width or width // heads
    if f.values.get("head_dim") is None and family.head_width is None and width % heads:
        raise InputError(
            f"{f.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    _refuse_other_arithmetic(f, f.values.get("head_dim") or head_width)
    layers, max_positions = f.size("num_hidden_layers"), f.size("max_position_embeddings")
    if layers > _MOST_LAYERS:
        raise f.wrong("num_hidden_layers", f"at most {_MOST_LAYERS}")
    # A null means as many as heads; what is absent is the class's default.
    absent = "num_key_value_heads" not in f.values
    config = LlamaConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        mlp_width=f.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=f.size("num_key_value_heads", (absent and family.kv_heads) or heads),
        head_width=f.size("head_dim", head_width),
        norm_eps=f.positive("rms_norm_eps"),
        rope=rope_from_hf(f, family.theta, max_positions),
        max_positions=max_positions,
        tied_head=f.get("tie_word_embeddings", bool, family.tied_head),
        **own_fields(f, kind, layers, max_positions),
        init_stddev=f.positive("initializer_range", 0.02),
    )
    if config.head_width % 2:
        raise InputError(
            f"{f.where}: heads of {config.head_width} numbers cannot have rotary positions"
        )
    return config


def _refuse_other_arithmetic(f: Fields, head_width: Any) -> None:
    """Fields with which models of LLaMA's shape compute something that no family here does."""
    f.only("hidden_act", "silu", because="the MLP has another activation")
    f.only("hidden_activation", "silu", because="the MLP has another activation")
    f.only("mlp_bias", False, because="the MLP has biases")
    f.only("attention_out_bias", False, because="the attention's output has a bias")
    f.only("qk_layernorm", False, because="queries and keys are normalised")
    f.only("clip_qkv", because="q, k and v are clipped (OLMo's)")
    f.only("embedding_multiplier", 1, because="embeddings are scaled (Granite's)")
    f.only("residual_multiplier", 1, because="residuals are scaled (Granite's)")
    f.only("logits_scaling", 1, because="logits are scaled (Granite's)")
    f.only("logit_scale", 1, because="logits are scaled (Cohere's)")
    # What is no width is refused where it is read.
    whole = isinstance(head_width, int) and not isinstance(head_width, bool) and head_width > 0
    scale = head_width if whole else 1
    usual = 1 / math.sqrt(scale)
    f.only("attention_multiplier", usual, because="attention has another scale (Granite's)")
    f.only("query_pre_attn_scalar", scale, because="attention has another scale (Gemma's)")
    f.only("scale_emb", 1, because="embeddings are scaled (MiniCPM's)")
    f.only("scale_depth", because="residuals are scaled (MiniCPM's)")
    f.only("dim_model_base", because="logits are scaled (MiniCPM's)")
    f.only("attn_logit_softcapping", because="attention is soft-capped (Gemma 2's)")
    f.only("final_logit_softcapping", because="logits are soft-capped (Gemma 2's)")
    f.only("rope_interleaved", False, because="rotary pairs are neighbours, not halves")
    f.only("partial_rotary_factor", 1, because="only a part of each head is rotated")
    f.only("rotary_pct", 1, because="only a part of each head is rotated")
    f.only("is_encoder_decoder", False, because="the model has its own kind of encoder")
    f.only("add_cross_attention", False, because="the model has cross-attention")
    f.only("tie_encoder_decoder", False, because="the model has its own kind of encoder")
    f.only("cross_attention_hidden_size", because="the model has cross-attention")
    f.only("pruned_heads", {}, because="attention heads were cut out")
