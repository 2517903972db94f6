"""Opening model folders: what each format's config means, and what is said of damaged ones."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from llava_mini_jax import config as configs
from llava_mini_jax.errors import InputError
from llava_mini_jax.ops.rope import Llama3Scaling
from llava_mini_jax.weights import hub, names
from llava_mini_jax.weights.folders import open_model
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
LLAMA_3_1_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A copy of a release folder, tower config beside it, to be changed."""
    shutil.copytree(GOLDEN / "hd_c2", tmp_path / "case")
    return tmp_path / "case" / "model"


def change(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; `...` removes one."""
    values = json.loads((folder / "config.json").read_text()) | fields
    values = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def opened(folder: Path, **options: Any) -> configs.Bundle:
    return open_model(folder, compute_dtype="float32", **options)[0]


def test_a_release_folder(case: Path) -> None:
    found = opened(case)
    model = found.model
    assert configs.dialect_of(model) == "release"
    assert (model.compressor.grid, model.prefusion_layers, model.detach_text) == (2, 2, True)
    assert (found.images.grid, found.images.aspect, found.images.size) == (2, "pad", 56)
    assert (model.vision.select_layer, model.vision.used_layers, model.vision.grid) == (-2, 2, 4)
    assert found.prompt.template == "vicuna_v1" and found.prompt.max_length == 2048
    assert found.prompt.double_bos and found.prompt.fuse_answers and not found.prompt.fuse_id_zero
    assert (found.eos_ids, found.pad_id) == ((2,), 0)


def test_a_llama_3_1_release(case: Path) -> None:
    change(case, rope_scaling=LLAMA_3_1_SCALING, rope_theta=500000, eos_token_id=[128001, 128009])
    (case / "generation_config.json").unlink()
    found = opened(case)
    assert found.model.llm.rope == configs.LLAMA_3_1_8B.rope
    assert found.prompt.template == "llama_3_1" and found.eos_ids == (128001, 128009)
    # transformers 5 writes both into one object.
    one = LLAMA_3_1_SCALING | {"rope_theta": 500000.0}
    change(case, rope_scaling=..., rope_theta=..., rope_parameters=one)
    assert opened(case).model.llm.rope == configs.LLAMA_3_1_8B.rope
    assert isinstance(opened(case).model.llm.rope.scaling, Llama3Scaling)


def test_templates_of_language_models(case: Path, llava_hf: Path) -> None:
    """Guessed, for no config.json names them."""
    assert opened(case).prompt.template == "vicuna_v1"
    change(case, rope_theta=500000.0)
    assert opened(case).prompt.template == "llama_3"
    change(case, rope_scaling=LLAMA_3_1_SCALING)
    assert opened(case).prompt.template == "llama_3_1"
    assert opened(llava_hf).prompt.template == "vicuna_v1"
    text = json.loads((llava_hf / "config.json").read_text())["text_config"]
    change(llava_hf, text_config={**text, "rope_scaling": LLAMA_3_1_SCALING})
    assert opened(llava_hf).prompt.template == "llama_3_1"


def test_defaults_of_absent_fields(case: Path) -> None:
    change(
        case,
        prefusion_layer_num=...,
        resolution_ratio=...,
        mm_projector_type=...,
        num_key_value_heads=...,
        tokenizer_padding_side=...,
        tokenizer_model_max_length=...,
        mm_vision_select_feature=...,
    )
    found = opened(case)
    assert found.model.prefusion_layers == 4 and found.images.grid == 1
    assert found.model.projector.kind == "linear"
    assert found.model.llm.kv_heads == found.model.llm.heads
    assert found.prompt.padding_side == "right"
    assert found.prompt.max_length == found.model.llm.max_positions
    assert found.model.vision.select_feature == "patch"
    change(case, compressor_size=...)
    assert configs.dialect_of(opened(case).model).startswith("llava-1.5")


def test_a_public_tower_that_is_embedded_needs_no_folder(case: Path) -> None:
    shutil.rmtree(case.parent / "clip")
    change(case, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-1)
    vision = opened(case).model.vision
    assert vision == dataclasses.replace(configs.CLIP_L_336, select_layer=-1)


def remove_tower(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    prefix = names.LAYOUTS["release"].vision
    kept = {name: array for name, array in tensors.items() if prefix not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors")
    shutil.rmtree(folder.parent / "clip")


def section(**parts: Any) -> dict[str, Any]:
    return {"llava_mini_jax": parts}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "missing field": (
        {"hidden_size": ...},
        r'config.json has no field "hidden_size" \(a whole number\)',
    ),
    "text for a number": (
        {"num_hidden_layers": "2"},
        "\"num_hidden_layers\" is '2', expected a whole number",
    ),
    "truth for a number": ({"vocab_size": True}, '"vocab_size" is True, expected a whole number'),
    "fraction for a whole number": ({"compressor_size": 1.5}, '"compressor_size" is 1.5'),
    "list for text": ({"mm_projector_type": ["x"]}, '"mm_projector_type" is .* expected text'),
    "no such projector": ({"mm_projector_type": "q"}, 'projector "q" is unknown'),
    "other activation": ({"hidden_act": "gelu"}, "the MLP has another activation"),
    "attention biases": ({"attention_bias": True}, "q, k, v and o have biases"),
    "unknown scaling": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        'rope_scaling: scaling "longrope" is not supported; use one of linear, dynamic, llama3',
    ),
    "incomplete scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        'rope_scaling has no field "low_freq_factor"',
    ),
    "heads that do not fit": ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3"),
    "no heads": (
        {"num_attention_heads": 0, "head_dim": ...},
        "is 0, expected a whole number from 1 on",
    ),
    "unknown feature": ({"mm_vision_select_feature": "cls"}, 'vision feature "cls"; expected'),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "patches do not form a square grid"),
    "class token of a public tower": (
        {
            "mm_vision_select_feature": "cls_patch",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        },
        "patches do not form a square grid",
    ),
    "marks around images": (
        {"mm_use_im_start_end": True},
        '"mm_use_im_start_end" is true, but images between <im_start> and <im_end>',
    ),
    "no tokens": ({"compressor_size": 0}, '"compressor_size" is 0, expected a whole number from 1'),
    "layers below none": (
        {"prefusion_layer_num": -1},
        '"prefusion_layer_num" is -1, expected 0 or more',
    ),
    "unknown images": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
    "no such layer": ({"mm_vision_select_layer": -9}, "select_layer -9 of a tower of 3 layers"),
    "our section is text": ({"llava_mini_jax": "paper"}, "is 'paper', expected an object"),
    "unknown part": (section(modell={}), 'unknown part "modell"; known: model, prompt, images'),
    "part is a list": (section(model=[1]), 'unknown part "model"'),
    "unknown field": (
        section(prompt={"templat": "plain"}),
        r'llava_mini_jax.prompt has the unknown field "templat"; known: .*template',
    ),
    "unknown inner field": (
        section(model={"compressor": {"kind": "none", "size": 3}}),
        'model.compressor has the unknown field "size"',
    ),
    "wrong type in our section": (
        section(model={"fuse_compressed": 1}),
        "llava_mini_jax.model.fuse_compressed is 1, expected bool",
    ),
    "wrong inner type": (
        section(model={"compressor": {"grid": "2"}}),
        "model.compressor.grid is '2', expected int",
    ),
    "wrong inner value": (
        section(model={"compressor": {"kind": "magic"}}),
        'compressor "magic" is unknown',
    ),
    "compressor is no object": (section(model={"compressor": 3}), "compressor is 3, expected"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_cannot_be_used(case: Path, name: str) -> None:
    fields, message = BAD_CONFIGS[name]
    change(case, **fields)
    with pytest.raises(InputError, match=message) as caught:
        opened(case)
    assert "config.json" in str(caught.value)


def empty_tower(case: Path) -> None:
    remove_tower(case)
    change(case, mm_vision_tower="")


def no_config(case: Path) -> None:
    (case / "config.json").unlink()


def config_is_text(case: Path) -> None:
    (case / "config.json").write_text("{'hidden_size': 64}")


def config_is_binary(case: Path) -> None:
    (case / "config.json").write_bytes(b"\xff\xfe\x00")


def config_is_a_list(case: Path) -> None:
    (case / "config.json").write_text("[1]")


def tower_activation(case: Path) -> None:
    change(case.parent / "clip", hidden_act="gelu_fast")


def tower_config_is_text(case: Path) -> None:
    (case.parent / "clip" / "config.json").write_text("patch")


def no_weights(case: Path) -> None:
    (case / "model.safetensors").unlink()


def other_preprocessor(case: Path) -> None:
    path = case.parent / "clip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": False}))


BAD_FILES: list[tuple[Callable[[Path], None], str]] = [
    (no_config, r"config\.json does not exist: a model folder needs it"),
    (config_is_text, r"config\.json is not valid json"),
    (config_is_binary, r"config\.json is not valid json"),
    (config_is_a_list, r"config\.json holds a list, not a json object"),
    (tower_activation, 'activation "gelu_fast" is unknown; use one of quick_gelu, gelu'),
    (tower_config_is_text, r"clip/config\.json is not valid json"),
    (no_weights, "holds no model weights"),
    (other_preprocessor, 'preprocessor_config.json: field "do_center_crop" is False'),
    (remove_tower, 'the vision tower "clip" is neither a folder next to the model nor in its'),
    (empty_tower, 'the vision tower "" is neither a folder'),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FILES, ids=[f.__name__ for f, _ in BAD_FILES])
def test_folders_that_cannot_be_used(case: Path, damage: Callable, message: str) -> None:
    damage(case)
    with pytest.raises(InputError, match=message):
        opened(case)


def test_hub_names_without_a_network(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    message = '"no-owner/no-model" is not a local folder and could not be fetched from the hub'
    with pytest.raises(InputError, match=message):
        hub.resolve_folder("no-owner/no-model")
    remove_tower(case)
    change(case, mm_vision_tower="no-owner/no-model")
    with pytest.raises(InputError, match=message):
        opened(case)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, r"is gated, so ask for access on its page and log in"),
        (errors.RepositoryNotFoundError, r"no such repository, or it is private"),
        (errors.RevisionNotFoundError, r"no such revision"),
        (errors.LocalEntryNotFoundError, r"check the name and the network"),
    ],
)
def test_what_the_hub_refuses(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **more: Any) -> str:
        if issubclass(error, errors.HfHubHTTPError):
            raise error("no", response=SimpleNamespace(headers={}, request=None))
        raise error("no")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        hub.resolve_folder("owner/model")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_only_what_is_read_is_fetched_from_the_hub(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"safetensors": ["model-00001-of-00002.safetensors"], "bin": []}[kind]
    there = {
        *weights,
        *("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json"),
        *("tokenizer.model", "chat_template.jinja", "tf_model.h5", "flax_model.msgpack"),
        *("original/consolidated.00.pth", "onnx/config.json", "image.png", "training_args.bin"),
    }

    def fetch(name: str, *, revision: str | None, **patterns: Any) -> str:
        assert (name, revision) == ("owner/model", "v1.0")
        for file in filter_repo_objects(there, **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hub.resolve_folder("owner/model@v1.0") == tmp_path
    torch = [] if weights else ["pytorch_model-00001-of-00002.bin"]
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    texts = ["chat_template.jinja", "config.json", "pytorch_model.bin.index.json"]
    assert fetched == {*weights, *torch, *texts, "tokenizer.model"}


def test_names_that_are_no_folders(tmp_path: Path) -> None:
    assert hub.resolve_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; give the model's folder"):
        hub.resolve_folder(tmp_path / "file")
    for name in ("no/such/folder", "./nowhere at all", str(tmp_path / "no"), "~nosuchuser/model"):
        with pytest.raises(InputError, match="does not exist: check the path"):
            hub.resolve_folder(name)


@pytest.fixture
def llava_hf(tmp_path: Path) -> Path:
    """A folder as Hugging Face's own class writes it: fields that are defaults are left out."""
    folder = tmp_path / "hf"
    folder.mkdir()
    llm, vision = tiny.LLM, tiny.VISION
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 63,
        "text_config": {
            "model_type": "llama",
            "hidden_size": llm.width,
            "intermediate_size": llm.mlp_width,
            "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.language_model.norm.weight": np.ones(3)}, folder / "model.safetensors")
    return folder


def test_llava_hf(llava_hf: Path) -> None:
    found, published = open_model(llava_hf, compute_dtype="bfloat16")
    assert published[0].layout == names.as_written(names.LAYOUTS["llava-hf-4.52"], ())
    llm = found.model.llm
    assert (llm.vocab_size, llm.kv_heads, llm.rope.theta) == (32000, 4, 10000.0)
    assert (found.model.compressor.kind, found.model.prefusion_layers) == ("none", 0)
    assert found.model.vision == tiny.VISION and found.model.compute_dtype == "bfloat16"
    assert (found.images.aspect, found.images.size, found.pad_id) == ("crop", 16, 63)
    change(llava_hf, vision_feature_select_strategy="full")
    with pytest.raises(InputError, match=r"hf/config.json does not describe a model: .*\"full\""):
        opened(llava_hf)
    change(llava_hf, text_config=[])
    with pytest.raises(InputError, match=r'"text_config" is \[\], expected an object'):
        opened(llava_hf)
