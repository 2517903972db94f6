"""config.json: what changes the arithmetic is honoured or refused by name, and nothing is ignored.

Every refusal here was a silent wrong number before: the tensors of these models have LLaMA's names.
"""

from typing import Any

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig
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


def test_windows_that_cover_every_text_change_nothing() -> None:
    assert llm("mistral", sliding_window=256) == llm("mistral", sliding_window=None) == llm()
    # Mistral's class has a window of 4,096 where the file says nothing.
    assert llm("mistral", max_position_embeddings=4096).max_positions == 4096
    with pytest.raises(InputError, match=r'"sliding_window" is absent \(4096 by default\)'):
        llm("mistral", max_position_embeddings=4097)
    assert llm("llama", max_position_embeddings=4097).max_positions == 4097


def test_defaults_are_those_of_the_model_type() -> None:
    """A text_config leaves out what its own class has as a default."""
    left_out = dict(num_key_value_heads=..., intermediate_size=..., hidden_size=64)
    found = llm("mistral", nested=True, sliding_window=None, num_attention_heads=16, **left_out)
    assert (found.kv_heads, found.mlp_width) == (8, 14336)
    found = llm("llama", nested=True, num_attention_heads=16, **left_out)
    assert (found.kv_heads, found.mlp_width) == (16, 11008)


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
    ("fields", "message"),
    [
        ({"rope_scaling": [8.0]}, r'"rope_scaling" is \[8.0\], expected an object'),
        ({"rope_scaling": "llama3"}, "\"rope_scaling\" is 'llama3', expected an object"),
        ({"rope_parameters": "x"}, "\"rope_parameters\" is 'x', expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 'scaling "linear" is not supported'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'scaling "dynamic" is not'),
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
        ({"model_type": "siglip_vision_model"}, 'tower of model_type "siglip_vision_model"'),
        ({"model_type": "clip"}, 'no field "vision_config"'),
        ({"num_channels": 1}, '"num_channels" is 1'),
        ({"hidden_act": "gelu_pytorch_tanh"}, 'activation "gelu_pytorch_tanh" is unknown'),
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 7"),
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
