"""config.json: what changes the arithmetic is honoured or refused by name, and nothing is ignored.

Every refusal here was a silent wrong number before: the tensors of these models have LLaMA's names.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig
from llava_mini_jax.weights import folders, names
from llava_mini_jax.weights.folders import load_params, open_model, open_parts
from llava_mini_jax.weights.hf_config import clip_from_hf, llama_from_hf
from llava_mini_jax.weights.hf_fields import LLM_HARMLESS
from llava_mini_jax.weights.hf_processor import OPENAI_CLIP

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
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


# --- Whole folders --------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release folder with the tower in its files, and in a folder beside it."""
    shutil.copytree(GOLDEN / "hd_c2", tmp_path / "case")
    folder = tmp_path / "case" / "model"
    prefix = "model.vision_tower.vision_tower."
    found = load_file(folder / "model.safetensors")
    tower = {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}
    save_file(tower, folder.parent / "clip" / "model.safetensors")
    return folder


def change(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_model(folder, compute_dtype="float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_qwen"}, 'model_type "llava_qwen" is not supported'),
        ({"model_type": "llava_next"}, 'model_type "llava_next" is not supported'),
        ({"model_type": "llama"}, 'model_type "llama" is not supported'),
        ({"model_type": ...}, 'no field "model_type"'),
        ({"architectures": ["GraniteForCausalLM"]}, "\"architectures\" has 'GraniteForCausalLM'"),
        ({"architectures": [{}]}, '"architectures" has {}'),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "code of its own"),
        ({"auto_map": {"AutoConfig": "m.C"}}, "code of its own"),
        ({"mm_patch_merge_type": "spatial_unpad"}, '"mm_patch_merge_type"'),
        ({"mm_resampler_type": "spatial_pool"}, '"mm_resampler_type"'),
        ({"s2": True}, '"s2"'),
        ({"mm_pooler_ratio": 2}, '"mm_pooler_ratio"'),
        ({"sliding_window": 512}, '"sliding_window" is 512'),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"tokenizer_padding_side": "middle"}, '"tokenizer_padding_side"'),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"\(bitsandbytes\): quantized"),
        ({"quantization_config": {"bits": 4}}, r"\(of an unknown method\): quantized"),
        ({"compression_config": {"format": "int-quantized"}}, '"compression_config"'),
        ({"quantization": {"bits": 4, "group_size": 64}}, '"quantization"'),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
    ids=str,
)
def test_models_that_are_not_what_they_seem(release: Path, fields: dict, message: str) -> None:
    change(release, **fields)
    refused(release, message)


def test_what_llavas_training_leaves_behind_changes_nothing(release: Path) -> None:
    before = open_model(release, compute_dtype="float32")[0]
    change(
        release,
        unfreeze_mm_vision_tower=False,
        freeze_mm_vision_resampler=False,
        tune_mm_vision_resampler=False,
        mm_vision_tower_lr=2e-6,
        pretrain_prefusion="prefusion.bin",
        mm_resampler_type=None,
        mm_tunable_parts="mm_mlp_adapter",
        image_crop_resolution=None,
        max_length=4096,
        auto_map={"AutoTokenizer": ["x.T", None]},
    )
    assert open_model(release, compute_dtype="float32")[0] == before


@pytest.mark.parametrize("name", ["adapter_config.json", "hf_quant_config.json"])
def test_files_that_say_that_the_weights_are_others(release: Path, name: str) -> None:
    (release / name).write_text("{}")
    refused(release, f"holds {name}")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
def test_codes_are_never_read_as_numbers(release: Path, dtype: str) -> None:
    """Wherever their scales lie: in other tensors, other files, or nowhere."""
    tensors = load_file(release / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 10).astype(jax.numpy.dtype(dtype))
    save_file(tensors, release / "model.safetensors")
    bundle, published = open_model(release, compute_dtype="float32")
    with pytest.raises(InputError, match=f"{name} is {dtype}, codes of a quantized"):
        load_params(bundle, published, dtype="float32", unrolled=True)


def test_no_rotary_field_reaches_an_attribute_error(release: Path) -> None:
    for form in (None, [], {}, "", 0, [LLAMA_3_1], {"a": 1}):
        for name in ("rope_scaling", "rope_parameters"):
            change(release, rope_scaling=None, rope_parameters=None)
            change(release, **{name: form})
            try:
                open_model(release, compute_dtype="float32")
            except InputError as error:
                assert name in str(error)


# --- Tied heads -----------------------------------------------------------------------------------


def language_model(folder: Path, *, tied: bool, head: str | None) -> dict[str, np.ndarray]:
    """A LLaMA folder whose head is absent (None), the "equal" table of tokens, or its "own"."""
    source = GOLDEN / "hd_c2" / "model"
    parts = ("model.layers.", "model.embed_tokens", "model.norm", "lm_head")
    found = load_file(source / "model.safetensors")
    tensors = {name: array for name, array in found.items() if name.startswith(parts)}
    own = tensors.pop("lm_head.weight")
    if head is not None:
        tensors["lm_head.weight"] = (
            own if head == "own" else tensors["model.embed_tokens.weight"].copy()
        )
    values = json.loads((source / "config.json").read_text())
    kept = {name: values[name] for name in LLAMA}
    kept |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    kept |= {"tie_word_embeddings": tied, "eos_token_id": 2}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(kept))
    return tensors


@pytest.mark.parametrize(
    ("tied", "head", "is_tied"),
    [
        (True, None, True),
        (True, "equal", True),
        (True, "own", False),
        (False, "own", False),
        (False, "equal", False),
    ],
)
def test_a_head_of_its_own_is_never_dropped(
    release: Path, tmp_path: Path, tied: bool, head: str | None, is_tied: bool
) -> None:
    tensors = language_model(tmp_path / "llm", tied=tied, head=head)
    _, llm_config, published = open_parts(release.parent / "clip", tmp_path / "llm")
    assert llm_config.tied_head == is_tied
    if head is not None and not is_tied:
        (piece,) = [p for p in published if "lm_head.weight" in p.tensors]
        read = piece.tensors["lm_head.weight"].read()
        assert read.tobytes() == tensors["lm_head.weight"].tobytes()


def test_a_head_is_compared_row_by_row_to_its_last(tmp_path: Path) -> None:
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    other = table.copy()
    other[-1, -1] += 1
    save_file({"a": table, "b": table.copy(), "c": other}, tmp_path / "x.safetensors")
    found = folders.open_tensors(tmp_path / "x.safetensors")
    assert folders.same_numbers(found["a"], found["b"], rows=4)
    assert not folders.same_numbers(found["a"], found["c"], rows=4)


# --- Names of towers ------------------------------------------------------------------------------


def without_vision_model(file: Path) -> None:
    tensors = load_file(file)
    renamed = {name.replace(names.VISION_MODEL, ""): array for name, array in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)


@pytest.mark.parametrize("where", ["embedded", "own folder"])
def test_towers_are_read_by_either_of_their_names(release: Path, where: str) -> None:
    """transformers 5.12 took "vision_model." out of the names it writes."""
    if where == "own folder":  # and none in the model's files
        tensors = load_file(release / "model.safetensors")
        kept = {n: a for n, a in tensors.items() if "vision_tower" not in n}
        save_file(kept, release / "model.safetensors")

    def read() -> list[np.ndarray]:
        bundle, published = open_model(release, compute_dtype="float32")
        params = load_params(bundle, published, dtype="float32", unrolled=False)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    before = read()
    folder = release if where == "embedded" else release.parent / "clip"
    without_vision_model(folder / "model.safetensors")
    for a, b in zip(before, read(), strict=True):
        assert a.tobytes() == b.tobytes()
