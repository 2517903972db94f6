"""Adapters: those that PEFT has saved give PEFT's numbers, and others are refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_mini_jax import cli
from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.save_torch import save_torch
from llava_mini_jax.weights import adapters, folders
from llava_mini_jax.weights.export_adapter import refuse_base
from llava_mini_jax.weights.import_hf import load_params
from tests import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
READ = ("plain", "patterns", "rslora", "saved")
# Float32 sums of four products in another order than torch's.
SUMS = 1e-6


def copied(tmp_path: Path, name: str, base: str = "base") -> Path:
    for each in (name, base):
        shutil.copytree(GOLDEN / each, tmp_path / each)
    return tmp_path / name


def changed(folder: Path, **fields) -> Path:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("name", READ)
def test_what_peft_merges_is_what_is_read(name):
    adapter = adapters.open_adapter(GOLDEN / name)
    ours, base = adapter.tensors(), open_tensors(GOLDEN / "base")
    expected = open_tensors(GOLDEN / name / "merged.safetensors")
    for key, tensor in base.items():
        wanted = expected.get(key, tensor).read()
        assert np.abs(ours[key].read() - wanted).max() < SUMS, key
    assert len(expected) >= 2 and set(ours) == set(base)


def test_parts_are_read_as_the_whole_is():
    ours = adapters.open_adapter(GOLDEN / "saved").tensors()
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        whole = ours[name].read()
        for index in ((slice(1, 5),), (slice(None), slice(2, 3)), (slice(0, 7, 2), slice(3, 8))):
            np.testing.assert_allclose(ours[name].read(index), whole[index], atol=SUMS)
        half = ours[name].read((), lambda shape, _: np.empty(shape, np.float16))
        assert np.array_equal(half, whole.astype(np.float16))


@pytest.mark.parametrize("before", [False, True])
def test_an_adapter_of_a_published_llava_opens(tmp_path, before):
    """Trained on transformers' class; its base may have the names of before 4.52 or after."""
    folder = copied(tmp_path, "llava-lora", "llava")
    if before:
        tensors = {n: t.read() for n, t in open_tensors(GOLDEN / "llava").items()}
        renamed = {n: n for n in tensors}
        for new, old in adapters.RENAMED:
            renamed |= {n: old + n.removeprefix(new) for n in tensors if n.startswith(new)}
        (tmp_path / "llava" / "model.safetensors").unlink()
        save_torch(
            tmp_path / "llava" / "pytorch_model.bin", {renamed[n]: a for n, a in tensors.items()}
        )
    bundle, published = folders.open_model(folder, compute_dtype="float32")
    params = load_params(bundle, published, dtype="float32", unrolled=True)
    merged = open_tensors(GOLDEN / "llava-lora" / "merged.safetensors")
    for layer, block in enumerate(params.llm.layers):
        name = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
        found = np.asarray(block.q_proj).reshape(merged[name].shape)
        assert np.abs(found - merged[name].read()).max() < SUMS


@pytest.mark.parametrize(
    "name, said",
    [
        ("dora", '"use_dora" is True'),
        ("pissa", '"init_lora_weights" is .pissa'),
        ("bias", '"bias" is .all'),
    ],
)
def test_other_kinds_are_refused_by_field(name, said):
    with pytest.raises(InputError, match=said):
        adapters.open_adapter(GOLDEN / name)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(peft_type="IA3"), "\"peft_type\" is 'IA3'"),
        (dict(r="4"), "field \"r\" is '4', expected a whole number"),
        (dict(lora_alpha=None), 'no field "lora_alpha"'),
        (dict(r=5), "of rank 5"),
        (dict(fan_in_fan_out=True), '"fan_in_fan_out" is True'),
        (dict(layer_replication=[[0, 1]]), '"layer_replication"'),
        (dict(a_new_way=1), '"a_new_way"'),
        (dict(rank_pattern={"(": 2}), '"rank_pattern"'),
        (dict(alpha_pattern={"q_proj": "x"}), '"alpha_pattern"'),
        (dict(base_model_name_or_path="../nothing"), "which cannot be found"),
        (dict(base_model_name_or_path="../plain"), "which cannot be found"),
    ],
)
def test_wrong_fields_are_one_sentence(tmp_path, fields, said):
    folder = changed(copied(tmp_path, "plain"), **fields)
    with pytest.raises(InputError) as caught:
        adapters.open_adapter(folder).tensors()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = copied(tmp_path, "plain", "llava")
    with pytest.raises(InputError, match=r"is an adapter of another model than .*is not in it"):
        adapters.open_adapter(folder, tmp_path / "llava").tensors()
    tensors = {n: t.read() for n, t in open_tensors(GOLDEN / "base").items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    save_base(tmp_path / "narrow", tensors | {name: tensors[name][:4]})
    with pytest.raises(InputError, match=r"its weight has shape \(4, 8\)"):
        adapters.open_adapter(folder, tmp_path / "narrow").tensors()
    save_base(tmp_path / "same", tensors)
    said = {"sha256": adapters.digest(open_tensors(GOLDEN / "base"))}
    (folder / adapters.BASE).write_text(json.dumps(said))
    adapters.open_adapter(folder, tmp_path / "same").tensors()
    save_base(tmp_path / "other", tensors | {name: tensors[name] + 1e-3})
    with pytest.raises(InputError, match="its tensors are not those that adapter_base"):
        adapters.open_adapter(folder, tmp_path / "other").tensors()


def save_base(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    save_torch(folder / "pytorch_model.bin", tensors)


def test_a_table_that_is_the_head_too_is_refused(tmp_path):
    """PEFT changes what is looked up, and not the head."""
    folder = copied(tmp_path, "saved")
    tensors = {n: t.read() for n, t in open_tensors(GOLDEN / "base").items()}
    del tensors["lm_head.weight"]
    save_base(tmp_path / "tied", tensors)
    with pytest.raises(InputError, match=r"changes model\.embed_tokens, and the head of"):
        adapters.open_adapter(folder, tmp_path / "tied").tensors()


@pytest.mark.parametrize("name, said", [("plain", "an adapter itself"), ("llava", "other names")])
def test_what_no_adapter_can_belong_to_is_said_before_a_run(name, said):
    with pytest.raises(InputError, match=f"lora cannot start from .*{said}"):
        refuse_base(GOLDEN / name)
    refuse_base(tiny_model.folder("paper"))


def test_what_is_missing_is_said(tmp_path):
    folder = copied(tmp_path, "plain")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="but none of adapter_model"):
        adapters.open_adapter(folder).tensors()
    shutil.copy(GOLDEN / "base" / "model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(InputError):
        adapters.open_adapter(folder).tensors()


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    folder = copied(tmp_path, "plain", "patterns")
    with pytest.raises(InputError, match="which is an adapter itself: merge that first"):
        adapters.open_adapter(folder, tmp_path / "patterns")


def test_llavas_own_form_opens_on_a_language_model_alone(tmp_path):
    """As LLaVA's finetune_lora.sh leaves it: config.json, adapter, and the projector beside it, of
    a base that is the language model's folder."""
    whole = tiny_model.folder("release")
    bundle, published = folders.open_model(whole, compute_dtype="float32")
    tensors = {n: t.read() for each in published for n, t in each.tensors.items()}
    vicuna = {n: a for n, a in tensors.items() if "mm_projector" not in n and "vision" not in n}
    tower = {n: a for n, a in tensors.items() if "vision" in n}
    save_base(tmp_path / "vicuna", vicuna)
    shutil.copy(whole / "config.json", tmp_path / "vicuna")
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    projector = {n: a for n, a in tensors.items() if "mm_projector" in n} | tower
    prefixed = {f"base_model.model.{n}": a + 1 for n, a in projector.items()}
    save_torch(folder / adapters.WHOLE, prefixed)
    name = "model.layers.0.mlp.up_proj"
    out, into = tensors[f"{name}.weight"].shape
    pair = {
        f"base_model.model.{name}.lora_A.weight": np.ones((2, into), np.float32),
        f"base_model.model.{name}.lora_B.weight": np.ones((out, 2), np.float32),
    }
    save_torch(folder / "adapter_model.bin", pair)
    said = dict(peft_type="LORA", r=2, lora_alpha=4, base_model_name_or_path="lmsys/vicuna")
    (folder / adapters.CONFIG).write_text(json.dumps(said))
    opened, found = folders.open_model(folder, compute_dtype="float32")
    assert opened.model == bundle.model
    params = load_params(opened, found, dtype="float32", unrolled=True)
    before = load_params(bundle, published, dtype="float32", unrolled=True)
    added = np.asarray(params.llm.layers[0].up_proj) - np.asarray(before.llm.layers[0].up_proj)
    np.testing.assert_allclose(added, 4.0, atol=SUMS)  # alpha / rank * 2 ones
    moved = np.asarray(params.projector.fc1.kernel) - np.asarray(before.projector.fc1.kernel)
    np.testing.assert_allclose(moved, 1.0, atol=SUMS)


def test_torch_files_hold_what_they_were_given(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "é": np.float16([1.5])}
    arrays |= {"scalar": np.array(2.0), "transposed": np.arange(6.0).reshape(2, 3).T}
    save_torch(tmp_path / "x.bin", arrays)
    found = open_tensors(tmp_path / "x.bin")
    for name, array in arrays.items():
        read = found[name].read()
        assert read.dtype == array.dtype and np.array_equal(read, array)
    with pytest.raises(InputError, match="ids is int64, which y"):
        save_torch(tmp_path / "y.bin", {"ids": np.arange(3)})
    assert not (tmp_path / "y.bin").exists()


def test_a_base_is_told_where_there_is_none():
    with pytest.raises(InputError, match="is a whole model, not an adapter"):
        folders.open_model(tiny_model.folder("paper"), base=Path("x"), compute_dtype="float32")


def test_convert_merges_where_it_is_told_to(tmp_path, capsys):
    folder = copied(tmp_path, "llava-lora", "llava")
    assert cli.main(["convert", str(folder), str(tmp_path / "whole")]) != 0
    assert "is a LoRA adapter: give --merge" in capsys.readouterr().err
    options = ["--merge", "--format", "llava-hf"]
    assert cli.main(["convert", str(folder), str(tmp_path / "whole"), *options]) == 0
    found, expected = (
        {name: tensor.read() for name, tensor in open_tensors(place).items()}
        for place in (tmp_path / "whole", GOLDEN / "llava-lora" / "merged.safetensors")
    )
    for name, array in expected.items():
        old = name.replace("model.language_model.", "language_model.model.")
        assert np.abs(found[old] - array).max() < SUMS
    assert cli.main(["convert", str(tmp_path / "whole"), str(tmp_path / "b"), "--merge"]) != 0
    assert "not an adapter" in capsys.readouterr().err
