"""Hugging Face's config.json of language models, into this package's configuration.

    folder --config_fields--> Fields --llama_from_hf--> LlamaConfig

Many models share LLaMA's tensor names and compute something else: scaled residuals, layers without
rotary positions, a sliding window, capped logits. So the model's type must be one of `LLM_TYPES`,
and fields that change the arithmetic must have the one value that LLaMA computes with. What each
field means was read from transformers 5.24's configuration classes.
"""

import math
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig
from llava_mini_jax.weights import hf_fields

LLM_TYPES = ("llama", "mistral")
LLAVA_TYPES = ("llava_mini_llama", "llava_llama", "llava", "llava_mistral")
# A class name says what a model_type may hide: a reward model, a fork with layers of its own.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "LlavaForConditionalGeneration",
    "LlavaMiniLlamaForCausalLM",
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
)

# What the configuration classes leave out of a nested config because it is a default. Mistral's
# class begins with a window and eight key/value heads, so it has these defaults at the top too.
_LLAMA_DEFAULTS = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    vocab_size=32000,
)
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | dict(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32
)
_MISTRAL_WINDOW = 4096


def config_fields(folder: Path) -> Fields:
    """The fields of a folder's config.json; quantized weights end here."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    refuse_quantized(values, where)
    for name, what in hf_fields.FOREIGN_FILES.items():
        if (folder / name).is_file():
            raise InputError(f"{folder} holds {name}: {what}")
    return Fields(values, where)


def refuse_quantized(values: dict[str, Any], where: str) -> None:
    """Codes of fewer bits are no numbers until they meet their scales, and those lie anywhere."""
    for place in (values, values.get("text_config"), values.get("vision_config")):
        for name in ("quantization_config", "compression_config", "quantization"):
            found = place.get(name) if isinstance(place, dict) else None
            if not found:
                continue
            how = found.get("quant_method") if isinstance(found, dict) else found
            raise InputError(
                f'{where} has "{name}" ({how or "of an unknown method"}): quantized weights cannot'
                " be read; give the folder of the original model in float16, bfloat16 or float32"
                " (--dtype int8 quantizes while loading)"
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
            f'{f.where}: "auto_map" says that the model brings code of its own ({own[0]}), which is'
            " not run here and may compute something else; take the field out if it does not"
        )
    return kind


def refuse_other_llava(f: Fields) -> None:
    """Fields with which models of LLaVA's family treat pictures in another way."""
    if f.get("mm_use_im_start_end", bool, False):
        raise InputError(
            f'{f.where}: "mm_use_im_start_end" is true, but pictures between <im_start> and'
            " <im_end> are not supported; only models trained without these tokens can be used"
        )
    f.only("mm_patch_merge_type", "flat", because="parts of pictures are merged (LLaVA-NeXT's)")
    f.only("mm_resampler_type", because="a resampler stands before the projector")
    # LLaVA-NeXT pools the frames of videos by these, whatever the resampler is.
    for name in ("mode", "stride", "out_channels"):
        f.only(f"mm_spatial_pool_{name}", because="frames of videos are pooled (LLaVA-NeXT's)")
    f.only("mm_newline_position", because="marks stand between frames (LLaVA-Video's)")
    f.only("s2", False, because="the tower sees pictures at several scales")
    f.only("add_faster_video", False, because="videos are pooled (LLaVA-Video's)")
    f.only("add_time_instruction", False, because="prompts state the times of frames")
    f.only("use_mm_proj", True, because="there is no projector")


def llama_from_hf(f: Fields, kind: str, *, nested: bool = False) -> LlamaConfig:
    """LlamaConfig of the fields of a "llama" or "mistral" model; `nested`: of a text_config, from
    which transformers leaves defaults out. The caller ends with `f.finish(hf_fields.LLM_HARMLESS)`.
    """
    if nested:
        f.defaults = _MISTRAL_DEFAULTS if kind == "mistral" else _LLAMA_DEFAULTS
    heads, width = f.size("num_attention_heads"), f.size("hidden_size")
    if f.values.get("head_dim") is None and width % heads:
        raise InputError(
            f"{f.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    _refuse_other_arithmetic(f, heads, width)
    config = LlamaConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        mlp_width=f.size("intermediate_size"),
        layers=f.size("num_hidden_layers"),
        heads=heads,
        kv_heads=f.size("num_key_value_heads", 8 if kind == "mistral" else heads),
        head_width=f.size("head_dim", width // heads),
        norm_eps=f.positive("rms_norm_eps"),
        rope=_rope_from_hf(f),
        max_positions=f.size("max_position_embeddings"),
        tied_head=f.get("tie_word_embeddings", bool, False),
        init_stddev=f.positive("initializer_range", 0.02),
    )
    if config.head_width % 2:
        raise InputError(f"{f.where}: heads of {config.head_width} numbers cannot be rotated")
    _refuse_window(f, kind, config.max_positions)
    return config


def _refuse_other_arithmetic(f: Fields, heads: int, width: int) -> None:
    """Fields with which models of LLaMA's shape compute something else than LLaMA."""
    f.only("hidden_act", "silu", because="the MLP has another activation")
    f.only("hidden_activation", "silu", because="the MLP has another activation")
    f.only("attention_bias", False, because="q, k, v and o have biases")
    f.only("mlp_bias", False, because="the MLP has biases")
    f.only("qkv_bias", False, because="q, k and v have biases (Qwen's)")
    f.only("attention_out_bias", False, because="the attention's output has a bias")
    f.only("use_qk_norm", False, because="queries and keys are normalised (Qwen3's)")
    f.only("qk_layernorm", False, because="queries and keys are normalised")
    f.only("clip_qkv", because="q, k and v are clipped (OLMo's)")
    f.only("embedding_multiplier", 1, because="embeddings are scaled (Granite's)")
    f.only("residual_multiplier", 1, because="residuals are scaled (Granite's)")
    f.only("logits_scaling", 1, because="logits are scaled (Granite's)")
    f.only("logit_scale", 1, because="logits are scaled (Cohere's)")
    scale = (f.values.get("head_dim") or width // heads) if _has_whole(f, "head_dim") else 1
    usual = 1 / math.sqrt(scale) if scale > 0 else 1
    f.only("attention_multiplier", usual, because="attention has another scale (Granite's)")
    f.only("query_pre_attn_scalar", scale, because="attention has another scale (Gemma's)")
    f.only("scale_emb", 1, because="embeddings are scaled (MiniCPM's)")
    f.only("scale_depth", because="residuals are scaled (MiniCPM's)")
    f.only("dim_model_base", because="logits are scaled (MiniCPM's)")
    f.only("attn_logit_softcapping", because="attention is soft-capped (Gemma 2's)")
    f.only("final_logit_softcapping", because="logits are soft-capped (Gemma 2's)")
    layers = f.values.get("num_hidden_layers")
    rotary = [1] * layers if isinstance(layers, int) and 0 < layers < 10_000 else []
    f.only("no_rope_layers", [], rotary, because="some layers have no rotary positions (SmolLM3's)")
    f.only("no_rope_layer_interval", because="some layers have no rotary positions (SmolLM3's)")
    f.only("rope_interleaved", False, because="rotary pairs are neighbours, not halves")
    f.only("partial_rotary_factor", 1, because="only a part of each head is rotated")
    f.only("rotary_pct", 1, because="only a part of each head is rotated")
    f.only("is_encoder_decoder", False, because="the model has an encoder of its own")
    f.only("add_cross_attention", False, because="the model has cross-attention")
    f.only("tie_encoder_decoder", False, because="the model has an encoder of its own")
    f.only("cross_attention_hidden_size", because="the model has cross-attention")
    f.only("pruned_heads", {}, because="attention heads were cut out")


def _has_whole(f: Fields, name: str) -> bool:
    value = f.values.get(name)
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _refuse_window(f: Fields, kind: str, max_positions: int) -> None:
    f.only("use_sliding_window", False, because="attention sees a window of the text only")
    full = f.get("layer_types", list, [])
    if strange := [one for one in full if one != "full_attention"]:
        raise InputError(
            f'{f.where}: "layer_types" has {strange[0]!r}; only "full_attention" is supported'
        )
    # Mistral's class takes a window even where the file says nothing of one.
    default = _MISTRAL_WINDOW if kind == "mistral" and "sliding_window" not in f.values else None
    window = f.size("sliding_window", default)
    if window is not None and window < max_positions:
        said = (
            f"is {window}" if "sliding_window" in f.values else f"is absent ({window} by default)"
        )
        raise InputError(
            f'{f.where}: "sliding_window" {said}, so that with up to {max_positions} positions the'
            " attention forgets the beginning of a text, which is not supported; use a model"
            " without a window (null), or one whose window covers max_position_embeddings"
        )


def _rope_from_hf(f: Fields) -> RopeConfig:
    """The rotary angles. transformers 5 writes one object, `rope_parameters`; before there were
    `rope_theta` and `rope_scaling`. Where a file has both, they must say the same."""
    old, new = f.object("rope_scaling"), f.object("rope_parameters")
    base = f.positive("rope_theta", 10000.0)
    found = {
        name: _rope_of(Fields(one, f"{f.where}: {name}"), f, base)
        for name, one in (("rope_scaling", old), ("rope_parameters", new))
        if one is not None
    }
    if len(set(found.values())) > 1:
        raise InputError(
            f'{f.where}: "rope_scaling" and "rope_parameters" contradict each other'
            f" ({found['rope_scaling']}, {found['rope_parameters']}); take the wrong one out"
        )
    return next(iter(found.values()), RopeConfig(theta=base, scaling=None))


def _rope_of(r: Fields, f: Fields, base: float) -> RopeConfig:
    theta = r.positive("rope_theta", base)
    if f.values.get("rope_theta") is not None and theta != base:
        raise InputError(
            f"{r.where} has rope_theta {theta:g}, but {f.where} says {base:g}; take one out"
        )
    kind = r.get("rope_type", str, r.get("type", str, "default"))
    if r.get("type", str, kind) != kind:
        raise InputError(f'{r.where} has rope_type "{kind}" and type "{r.values["type"]}"')
    r.only("partial_rotary_factor", 1, because="only a part of each head is rotated")
    if kind == "default":
        r.finish(("original_max_position_embeddings",))
        return RopeConfig(theta=theta, scaling=None)
    if kind != "llama3":
        raise InputError(f'{r.where}: scaling "{kind}" is not supported; use "llama3" or none')
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
    r.finish(())
    return RopeConfig(theta=theta, scaling=scaling)
