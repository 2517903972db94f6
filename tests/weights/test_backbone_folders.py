"""Folders of every family: two of them make a model, and what is written is read back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax import cli
from llava_mini_jax import params as param_tree
from llava_mini_jax.errors import InputError
from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.weights import lazy_params, names
from llava_mini_jax.weights.export_hf import export_model
from llava_mini_jax.weights.folders import open_model
from llava_mini_jax.weights.import_hf import load_params
from tests import tiny
from tests.golden_backbones import FOLDER, LANGUAGE_MODELS

fast_compilation = tiny.fast_compilation

LLAVA = FOLDER / "llava_siglip_qwen2"
# Each language model once, behind one of the towers.
PAIRS = [(llm, ("clip", "siglip", "siglip2")[n % 3]) for n, llm in enumerate(LANGUAGE_MODELS)]
TYPES = {
    "llama": "llava_mini_llama",
    "mistral": "llava_mini_mistral",
    "qwen2": "llava_mini_qwen2",
    "qwen3": "llava_mini_qwen3",
    "smollm2": "llava_mini_llama",
    "smollm3": "llava_mini_smollm3",
}


def start(llm: str, vision: str) -> tuple[Any, Any]:
    return lazy_params.start_from_parts(
        FOLDER / vision,
        FOLDER / llm,
        dialect="paper",
        grid=1,
        prefusion_layers=2,
        prefusion_init="copy",
        seed=0,
        dtype=None,
    )


def same(found: Any, expected: Any) -> None:
    ours, theirs = param_tree.paths(found), param_tree.paths(expected)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize(("llm", "vision"), PAIRS)
def test_a_start_from_two_folders_is_read_back(llm: str, vision: str, tmp_path: Path) -> None:
    bundle, params = start(llm, vision)
    export_model(params, bundle, tmp_path / "start", copy_from=FOLDER / llm)
    values = json.loads((tmp_path / "start" / "config.json").read_text())
    assert values["model_type"] == TYPES[llm.split("_")[0]]
    found, published = open_model(tmp_path / "start", compute_dtype=bundle.model.compute_dtype)
    assert found.model == bundle.model and found.images == bundle.images
    assert found.images.resample == ("bilinear" if vision == "siglip2" else "bicubic")
    same(load_params(found, published, dtype="float32", unrolled=True), params)
    # Pre-fusion began as a copy of the first layers, with all that the family has of its own.
    first = param_tree.paths(params.llm.layers[:2])
    copied = param_tree.paths(params.prefusion.layers)
    assert first.keys() == copied.keys()
    assert ("0/q_bias" in first) == bundle.model.llm.qkv_bias
    for path, leaf in first.items():
        assert np.asarray(leaf).tobytes() == np.asarray(copied[path]).tobytes()
    # The language model's tensors have their published names again.
    own = load_file(FOLDER / llm / "model.safetensors")
    written = load_file(tmp_path / "start" / "model.safetensors")
    for name, array in own.items():
        assert written[name].tobytes() == array.tobytes(), name


def test_the_command_line_does_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--vision", str(FOLDER / "siglip2"), "--llm", str(FOLDER / "qwen3")]
    target = tmp_path / "start"
    assert cli.main(["convert", *words, "--prefusion-layers", "1", str(target)]) == 0
    assert cli.main(["inspect", str(target)]) == 0
    said = capsys.readouterr().out
    assert "llm/layers/q_norm" in said and "vision/patch_bias" in said
    assert "class_token" not in said.split("dialect:")[0]


@pytest.mark.parametrize("format", ["llava-hf", "llava-1.5", "release"])
def test_a_llava_of_siglip_and_qwen2_comes_back(format: str, tmp_path: Path) -> None:
    bundle, params = lazy_params.open_for_export(LLAVA, vision_tower=None, dtype=None)
    export_model(params, bundle, tmp_path / "model", format=format)
    found, published = open_model(tmp_path / "model", compute_dtype=bundle.model.compute_dtype)
    assert found.model.llm == bundle.model.llm and found.model.vision == bundle.model.vision
    assert (found.eos_ids, found.images) == (bundle.eos_ids, bundle.images)
    same(load_params(found, published, dtype="float32", unrolled=True), params)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    if format != "llava-hf":
        assert values["model_type"] == "llava_qwen2"
        assert values["architectures"] == ["LlavaQwen2ForCausalLM"]
        return
    assert values["text_config"]["model_type"] == "qwen2"
    assert values["vision_config"]["model_type"] == "siglip_vision_model"
    assert values["vision_feature_select_strategy"] == "full"
    theirs, ours = (load_file(one / "model.safetensors") for one in (LLAVA, tmp_path / "model"))
    renamed = {name.replace(names.VISION_MODEL, ""): array for name, array in ours.items()}
    assert renamed.keys() == theirs.keys()
    for name, array in theirs.items():
        assert renamed[name].tobytes() == array.tobytes(), name


# What a LLaMA's file would say.
LLAMA = {"model_type": "llama", "architectures": [], "max_window_layers": None}


def changed(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("llm", "fields", "message"),
    [
        # Another family's name: its tensors are missing, or left over.
        ("qwen2", LLAMA, 'is "qwen2"'),
        ("qwen3", LLAMA, 'is "qwen3"'),
        ("qwen2", {"model_type": "llama", "architectures": []}, '"max_window_layers"'),
        (
            "llama_2",
            {"model_type": "qwen2", "architectures": [], "attention_bias": None},
            "missing for llm/layers/0/q_bias",
        ),
        (
            "llama_3_1",
            {"model_type": "qwen3", "architectures": []},
            "missing for llm/layers/0/q_norm",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "\"hidden_act\" is 'gelu'"),
        ("qwen3", {"num_experts": 8}, '"num_experts"'),
        ("smollm3", {"mlp_bias": True}, '"mlp_bias" is True'),
        ("qwen2", {"model_type": "qwen2_moe"}, 'model_type "qwen2_moe" is not supported'),
        ("qwen2", {"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel"),
    ],
    ids=str,
)
def test_language_models_that_are_not_what_they_say(
    llm: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(FOLDER / llm, tmp_path, **fields)
    with pytest.raises(InputError, match=message):
        lazy_params.start_from_parts(
            FOLDER / "clip",
            folder,
            dialect="paper",
            grid=1,
            prefusion_layers=0,
            prefusion_init="fresh",
            seed=0,
            dtype=None,
        )


def test_a_model_of_layers_that_differ_does_not_compress_inside() -> None:
    bundle, _ = start("smollm3", "clip")
    inside = dict(prefusion_layers=0, inside_layers=2)
    model = dataclasses.replace(bundle.model, **inside)
    example = tiny.example(0, 8, {2: 1}, model)
    inputs = tiny.batch([example], model).inputs
    with pytest.raises(ValueError, match=r"run by themselves \(inside_layers\)"):
        jax.eval_shape(lambda p: tiny.logits(p, inputs, model), tiny.weights(model))


def test_int8_rounds_products_and_no_bias(tmp_path: Path) -> None:
    bundle, params = start("qwen2_yarn", "siglip")
    export_model(params, bundle, tmp_path / "start")
    found, published = open_model(tmp_path / "start", compute_dtype="float32")
    loaded = load_params(found, published, dtype="float32", narrow="int8", unrolled=True)
    layer, own = loaded.llm.layers[0], params.llm.layers[0]
    assert isinstance(layer.q_proj, Int8Weight)
    for name in ("q_bias", "k_bias", "v_bias"):
        np.testing.assert_array_equal(getattr(layer, name), np.asarray(getattr(own, name)))
    np.testing.assert_array_equal(loaded.vision.patch_bias, np.asarray(params.vision.patch_bias))
