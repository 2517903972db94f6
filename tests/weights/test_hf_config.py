"""config.json: what changes the arithmetic is honoured or refused by name, and nothing is ignored.

Every refusal here was a silent wrong number before: the tensors of these models have LLaMA's names.
"""

import dataclasses
import json
import math
from typing import Any

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig
from llava_mini_jax.weights.export_json import llama_json
from llava_mini_jax.weights.families import FAMILIES, family_of
from llava_mini_jax.weights.hf_config import llama_from_hf
from llava_mini_jax.weights.hf_fields import LLM_HARMLESS
from llava_mini_jax.weights.hf_processor import OPENAI_CLIP
from llava_mini_jax.weights.towers import clip_from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def llm(kind: str = "llama", nested: bool = False, **fields: Any):
    """LlamaConfig of LLAMA with these fields; `...` leaves one out."""
    values = {name: value for name, value in (LLAMA | fields).items() if value is not ...}
    f = Fields(values, "config.json")
    found = llama_from_hf(f, kind, nested=nested)
    f.finish(LLM_HARMLESS)
    return found


def clip(values: dict[str, Any] = CLIP, **fields: Any):
    values = {name: value for name, value in (values | fields).items() if value is not ...}
    return clip_from_hf(
        values, "clip.json", select_layer=-2, select_feature="patch", processor=OPENAI_CLIP
    )


OTHER_ARITHMETIC = [
    ("embedding_multiplier", 12.0),
    ("attention_multiplier", 0.0078125),
    ("residual_multiplier", 0.22),
    ("logits_scaling", 8.0),
    ("logit_scale", 0.0625),
    ("scale_emb", 12),
    ("scale_depth", 1.4),
    ("dim_model_base", 256),
    ("no_rope_layers", [1, 0]),
    ("no_rope_layer_interval", 4),
    ("hidden_act", "gelu_pytorch_tanh"),
    ("hidden_activation", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("qkv_bias", True),
    ("attention_out_bias", True),
    ("use_qk_norm", True),
    ("qk_layernorm", True),
    ("clip_qkv", 8.0),
    ("query_pre_attn_scalar", 256),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("partial_rotary_factor", 0.5),
    ("rotary_pct", 0.25),
    ("rope_interleaved", True),
    ("sliding_window", 128),
    ("use_sliding_window", True),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("is_encoder_decoder", True),
    ("add_cross_attention", True),
    ("pruned_heads", {"0": [1]}),
    # Nobody here knows these; so nobody may ignore them.
    ("mup_width_scale", 0.5),
    ("some_new_switch", False),
    ("num_experts", 8),
    ("transformers_weights", "other.safetensors"),
    ("original_max_position_embeddings", 128),
]


@pytest.mark.parametrize(("name", "value"), OTHER_ARITHMETIC, ids=[n for n, _ in OTHER_ARITHMETIC])
def test_a_field_that_changes_the_arithmetic_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f'config.json.*"{name}"') as caught:
        llm(**{name: value})
    assert "\n" not in str(caught.value)


def test_fields_at_the_value_that_llama_computes_with() -> None:
    """As transformers and tools write them: each at its neutral value, and notes of all kinds."""
    neutral = {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 8**-0.5,
        "residual_multiplier": 1,
        "logits_scaling": 1.0,
        "no_rope_layers": [1, 1],
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 2,
        "query_pre_attn_scalar": 8,
        "partial_rotary_factor": 1.0,
        "mlp_bias": False,
        "some_new_switch": None,
        "pruned_heads": {},
    }
    notes = {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "torch_dtype": "float16",
        "dtype": "bfloat16",
        "transformers_version": "5.24.0",
        "use_cache": True,
        "pretraining_tp": 2,
        "attention_dropout": 0.0,
        "temperature": 0.9,
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {}},
        "unsloth_fixed": True,
    }
    assert llm(**neutral, **notes) == llm()


# --- Families -------------------------------------------------------------------------------------


def test_windows_that_cover_every_text_change_nothing() -> None:
    assert llm("mistral", sliding_window=256) == llm("mistral", sliding_window=None)
    assert llm("mistral", sliding_window=None).window is None
    assert llm("llama", sliding_window=256) == llm("llama")


@pytest.mark.parametrize(
    ("kind", "fields", "window"),
    [
        ("mistral", {"sliding_window": 128}, 128),
        # The class has a window of 4,096 where the file says nothing.
        ("mistral", {"max_position_embeddings": 4096}, None),
        ("mistral", {"max_position_embeddings": 4097}, 4096),
        ("mistral", {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, 9),
        ("llama", {"max_position_embeddings": 4097}, None),
        ("qwen2", {"sliding_window": 9}, None),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True}, None),  # from layer 28 on
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True}, None),
        ("smollm3", {"sliding_window": 9, "no_rope_layers": [0, 0]}, None),
        (
            "smollm3",
            {"sliding_window": 9, "no_rope_layers": [0, 0], "use_sliding_window": True},
            9,
        ),
    ],
    ids=str,
)
def test_the_window_of_each_family(kind: str, fields: dict[str, Any], window: int | None) -> None:
    assert llm(kind, **fields).window == window


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"sliding_window": 9}, '"sliding_window" is 9, which LLaMA'),
        ("mistral", {"use_sliding_window": True}, '"use_sliding_window" is True'),
        ("mistral", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ("mistral", {"sliding_window": 0}, '"sliding_window" is 0'),
        (
            "mistral",
            {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
            'by "layer_types" some layers see a window of 9',
        ),
        (
            "mistral",
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            "but no sliding_window is in use",
        ),
        (
            "qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
            'by "max_window_layers" some layers see a window of 9',
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "but no sliding_window is in use"),
        (
            "smollm3",
            {"sliding_window": 9, "use_sliding_window": True, "no_rope_layers": [0, 1]},
            "some layers see a window of 9",
        ),
        ("qwen2", {"attention_bias": False}, '"attention_bias" is False, but q, k and v have no'),
        ("qwen2", {"use_mrope": True}, '"use_mrope"'),
        ("qwen2", {"use_qk_norm": True}, '"use_qk_norm"'),
        ("qwen3", {"attention_bias": True}, "q, k, v and o have biases"),
        ("qwen2", {"no_rope_layers": [1, 0]}, '"no_rope_layers"'),
        ("smollm3", {"no_rope_layers": [1]}, '"no_rope_layers".*for each of 2 layers'),
        ("smollm3", {"no_rope_layers": [1, 2]}, '"no_rope_layers"'),
        ("smollm3", {"no_rope_layers": [1, True]}, '"no_rope_layers"'),
        ("smollm3", {"no_rope_layer_interval": 0}, '"no_rope_layer_interval" is 0'),
    ],
    ids=str,
)
def test_fields_of_families_that_are_refused(
    kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        llm(kind, **fields)
    assert "\n" not in str(caught.value)


def test_what_families_have_of_their_own() -> None:
    own = {
        kind: (found.qkv_bias, found.qk_norm, found.nope_layers)
        for kind in FAMILIES
        for found in [llm(kind, num_hidden_layers=8, sliding_window=None)]
    }
    assert own == {
        "llama": (False, False, ()),
        "mistral": (False, False, ()),
        "qwen2": (True, False, ()),
        "qwen3": (False, True, ()),
        "smollm3": (False, False, (3, 7)),  # every fourth, where the file says nothing
    }
    assert llm("smollm3", no_rope_layers=[0, 1, 1]).nope_layers == (0,)
    assert llm("smollm3").tied_head and not llm("smollm3", tie_word_embeddings=False).tied_head
    assert llm("smollm3").rope.theta == 2e6 and llm("qwen3").rope.theta == 1e4


def test_defaults_are_those_of_the_model_type() -> None:
    """A text_config leaves out what its own class has as a default."""
    left_out = dict(num_key_value_heads=..., intermediate_size=..., hidden_size=64)
    found = llm("mistral", nested=True, sliding_window=None, num_attention_heads=16, **left_out)
    assert (found.kv_heads, found.mlp_width, found.head_width) == (8, 14336, 4)
    found = llm("llama", nested=True, num_attention_heads=16, **left_out)
    assert (found.kv_heads, found.mlp_width) == (16, 11008)
    found = llm("qwen3", nested=True, num_attention_heads=32, **left_out)
    assert (found.kv_heads, found.mlp_width, found.head_width) == (32, 22016, 128)
    # A null means as many as heads, whatever the class.
    assert llm("mistral", num_key_value_heads=None, sliding_window=None).kv_heads == 4


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA_3_1}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": True}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"rope_theta": 1e6}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"head_dim": 12}),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("smollm3", {"no_rope_layers": [0, 0], "sliding_window": 9, "use_sliding_window": True}),
    ],
    ids=str,
)
def test_every_family_is_written_as_it_is_read(kind: str, fields: dict[str, Any]) -> None:
    config = llm(kind, **fields)
    values = llama_json(config)
    assert family_of(config) == kind
    f = Fields(json.loads(json.dumps(values)), "config.json")
    assert llama_from_hf(f, kind) == config
    f.finish(LLM_HARMLESS)


def test_a_model_of_two_families_is_not_written() -> None:
    both = dataclasses.replace(llm("qwen2"), qk_norm=True)
    with pytest.raises(InputError, match="more than one of qkv_bias, qk_norm and nope_layers"):
        family_of(both)


# --- Rotary positions -----------------------------------------------------------------------------

SCALED = RopeConfig(
    theta=5e5,
    scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000, "rope_scaling": LLAMA_3_1},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_1 | {"type": "llama3"}},
        {"rope_parameters": LLAMA_3_1 | {"rope_theta": 500000.0}},
        {"rope_parameters": LLAMA_3_1 | {"partial_rotary_factor": 1.0}, "rope_theta": 5e5},
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA_3_1,
            "rope_parameters": LLAMA_3_1 | {"rope_theta": 500000.0},
        },
    ],
    ids=["published", "both words", "transformers 5", "half and half", "side by side"],
)
def test_forms_of_llama_3_1_positions(fields: dict[str, Any]) -> None:
    assert llm(**fields).rope == SCALED


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, 0.1 * math.log(4.0) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 2.0}, 0.1 * math.log(4.0) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1),
        ),
        ({"factor": 0.5}, 1.0),
    ],
    ids=str,
)
def test_the_stretch_of_yarn(fields: dict[str, Any], factor: float) -> None:
    found = llm(rope_scaling={"rope_type": "yarn", "factor": 4.0} | fields).rope
    assert found.stretch == pytest.approx(factor) and llm().rope.stretch == 1.0
    assert found.scaling.original_max_position_embeddings == 256  # all positions, if not said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": [8.0]}, r'"rope_scaling" is \[8.0\], expected an object'),
        ({"rope_scaling": "llama3"}, "\"rope_scaling\" is 'llama3', expected an object"),
        ({"rope_parameters": "x"}, "\"rope_parameters\" is 'x', expected an object"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, 'scaling "longrope" is not supp'),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, 'scaling "mrope" is not'),
        ({"rope_scaling": {"type": "linear"}}, 'no field "factor"'),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "expected a number above 0"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
            'fields that are not known here.*"alpha"',
        ),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, 'no field "factor"'),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "is below beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "above 1, not 1"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"\['yarn'\], expected text"),
        ({"rope_scaling": LLAMA_3_1 | {"attention_factor": 1.1}}, '"attention_factor"'),
        ({"rope_scaling": LLAMA_3_1 | {"type": "linear"}}, '"llama3" and type "linear"'),
        ({"rope_scaling": LLAMA_3_1 | {"factor": "8"}}, "\"factor\" is '8', expected a number"),
        ({"rope_scaling": LLAMA_3_1 | {"factor": 0}}, "expected a number above 0"),
        ({"rope_scaling": LLAMA_3_1 | {"high_freq_factor": 1.0}}, "is not above low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, '"partial_rotary_factor" is 0.5'),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "500000.*says 10000"),
        ({"rope_parameters": {"full_attention": LLAMA_3_1}}, '"full_attention"'),
        (
            {"rope_scaling": LLAMA_3_1, "rope_parameters": {"rope_type": "default"}},
            "contradict each other",
        ),
        ({"rope_theta": 0}, "expected a number above 0"),
        ({"rope_theta": float("inf")}, "expected a number"),
        ({"rope_theta": 10**400}, "expected a number"),
    ],
    ids=str,
)
def test_positions_that_are_not_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm(**fields)


# --- Towers ---------------------------------------------------------------------------------------


def test_a_full_clip_with_an_old_override() -> None:
    """`vision_config_dict` wins in transformers; the public folders hold both, equal."""
    nested = {name: value for name, value in CLIP.items() if name != "model_type"}
    full = {"model_type": "clip", "vision_config": nested, "vision_config_dict": dict(nested)}
    assert clip(full) == clip()
    full["vision_config_dict"]["num_hidden_layers"] = 24
    with pytest.raises(InputError, match=r'contradict each other in "num_hidden_layers" \(3, 24'):
        clip(full)
    # What one leaves out is its default, not what the other says.
    del full["vision_config"]["num_hidden_layers"]
    with pytest.raises(InputError, match=r'"num_hidden_layers" \(12, 24'):
        clip(full)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "dinov2"}, 'tower of model_type "dinov2" is not supported'),
        ({"model_type": "siglip2_vision_model"}, "siglip2_vision_model.*NaFlex"),
        ({"model_type": "siglip2"}, "siglip2.*NaFlex"),
        ({"model_type": "siglip"}, 'no field "vision_config"'),
        (
            {"model_type": "siglip", "vision_config": {"model_type": "clip_vision_model"}},
            "the tower is of another type",
        ),
        ({"model_type": "clip"}, 'no field "vision_config"'),
        ({"num_channels": 1}, '"num_channels" is 1'),
        ({"hidden_act": "gelu_fast"}, 'activation "gelu_fast" is unknown'),
        ({"image_size": 6}, "image_size 6 is below patch_size 7"),
        ({"image_size": [28, 28]}, "expected a whole number"),
        ({"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ({"use_head": True}, '"use_head"'),
        ({"vision_use_head": False}, '"vision_use_head"'),
        ({"layer_norm_eps": -1.0}, "expected a number above 0"),
    ],
    ids=str,
)
def test_towers_that_are_not_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        clip(**fields)


def test_a_margin_of_the_picture_is_no_patch() -> None:
    """SigLIP's towers of 384 pixels and patches of 14 have 27 of them along a side."""
    assert (clip(image_size=30).grid, clip(image_size=30).positions) == (4, 17)


SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}


def test_a_siglip() -> None:
    found = clip(SIGLIP, vision_use_head=False)
    assert (found.class_token, found.pre_norm, found.patch_bias) == (False, False, True)
    assert (found.width, found.activation, found.norm_eps) == (768, "gelu_pytorch_tanh", 1e-6)
    assert (found.grid, found.positions, found.select_feature) == (4, 16, "patch")
    nested = {name: value for name, value in SIGLIP.items() if name != "model_type"}
    assert clip({"model_type": "siglip", "vision_config": nested, "text_config": {}}) == found
    with pytest.raises(InputError, match='"hidden_dropout"'):
        clip(SIGLIP, hidden_dropout=0.1)


@pytest.mark.parametrize(
    ("values", "word", "message"),
    [
        (CLIP, "patch", None),
        (CLIP, "default", None),
        (CLIP, "full", 'vision feature "full"; expected "patch"'),
        (SIGLIP, "patch", None),
        (SIGLIP, "full", None),
        (SIGLIP, "default", '"default" leaves out the first position, which is a patch'),
        (SIGLIP, "cls_patch", 'vision feature "cls_patch"'),
    ],
)
def test_which_positions_are_read(values: dict[str, Any], word: str, message: str | None) -> None:
    def read():
        own = dict(select_layer=-2, select_feature=word, processor=OPENAI_CLIP)
        return clip_from_hf(values, "x", **own)

    if message is None:
        assert read().select_feature == "patch"
    else:
        with pytest.raises(ValueError, match=message):
            read()
