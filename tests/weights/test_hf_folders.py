"""Whole folders: what a model is, quantized weights, heads of their own, both names of towers."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llava_mini_jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import SECTION
from llava_mini_jax.weights import folders, names
from llava_mini_jax.weights.folders import open_model, open_parts
from llava_mini_jax.weights.import_hf import load_params
from tests import tiny_model
from tests.weights.test_hf_config import LLAMA, LLAMA_3_1

GOLDEN = Path(__file__).parents[1] / "golden" / "model"


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
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "its own code"),
        ({"auto_map": {"AutoConfig": "m.C"}}, "its own code"),
        ({"mm_patch_merge_type": "spatial_unpad"}, '"mm_patch_merge_type"'),
        ({"mm_resampler_type": "spatial_pool"}, '"mm_resampler_type"'),
        ({"s2": True}, '"s2"'),
        ({"mm_spatial_pool_stride": 2}, '"mm_spatial_pool_stride"'),
        ({"mm_newline_position": "grid"}, '"mm_newline_position"'),
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


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
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


def test_pictures_are_shown_twice_where_config_json_says_so(tmp_path: Path) -> None:
    """As in the release's scripts for ScienceQA and EgoSchema."""
    shutil.copytree(tiny_model.folder("release"), tmp_path / "twice")
    file = tmp_path / "twice" / "config.json"
    values = json.loads(file.read_text())
    values[SECTION]["images"]["repeat_whole"] = True
    file.write_text(json.dumps(values))
    asked = "<image>\nwhich digit is in row 1?", tiny_model.picture(0)
    models = [llava_mini_jax.load(f) for f in (tiny_model.folder("release"), tmp_path / "twice")]
    assert [model.bundle.images.parts for model in models] == [1, 2]
    once, twice = (model.generate(*asked, max_new_tokens=8) for model in models)
    assert once != twice
