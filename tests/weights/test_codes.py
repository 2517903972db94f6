"""Folders of 4-bit codes: AWQ's and GPTQ's numbers, kept codes, and what is refused.

golden/codes   packed and multiplied by AutoAWQ's and AutoGPTQ's own code (make_codes.py)
tiny folders    packed here, by a packer that goes bit by bit as their loops do
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.int4 import Int4Weight
from llava_mini_jax.params import paths
from llava_mini_jax.weights import folders, import_hf
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation
GOLDEN = Path(__file__).parents[1] / "golden"
GROUP = 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # gemm.py: order_map
Tensors = dict[str, np.ndarray]
AWQ = dict(quant_method="awq", bits=4, group_size=GROUP, version="gemm", zero_point=True)
GPTQ = dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=False)


def codes_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(codes [in, out], zeros [G, out] from 1 to 14, scales [G, out], numbers [out, in])."""
    rng = np.random.default_rng(weight.size)
    out, inputs = weight.shape
    codes = rng.integers(0, 16, (inputs, out))
    zeros = rng.integers(1, 15, (inputs // GROUP, out))
    scales = (rng.uniform(0.5, 2, zeros.shape) * np.abs(weight).max() / 15).astype(np.float16)
    row = np.arange(inputs) // GROUP
    numbers = (codes - zeros[row]) * scales[row].astype(np.float32)
    return codes, zeros, scales, numbers.T


def awq_parts(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Tensors:
    def pack(matrix: np.ndarray) -> np.ndarray:
        packed = np.zeros((matrix.shape[0], matrix.shape[1] // 8), np.int64)
        for column in range(packed.shape[1]):
            for place in range(8):
                packed[:, column] |= matrix[:, 8 * column + AWQ_ORDER[place]] << (4 * place)
        return packed.astype(np.uint32).view(np.int32)

    return dict(qweight=pack(codes), qzeros=pack(zeros), scales=scales)


def gptq_parts(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, less: int = 1) -> Tensors:
    inputs, out = codes.shape
    qweight = np.zeros((inputs // 8, out), np.int64)
    for i in range(inputs):
        qweight[i // 8] |= codes[i] << (4 * (i % 8))
    qzeros = np.zeros((len(zeros), out // 8), np.int64)
    for o in range(out):
        qzeros[:, o // 8] |= (zeros[:, o] - less) << (4 * (o % 8))
    words = (a.astype(np.uint32).view(np.int32) for a in (qweight, qzeros))
    found = dict(zip(("qweight", "qzeros"), words, strict=True))
    return found | dict(scales=scales, g_idx=np.arange(inputs, dtype=np.int32) // GROUP)


def write(folder: Path, said: dict, pack: Callable[..., Tensors]) -> dict[str, np.ndarray]:
    """A tiny model whose decoder layers are codes; returns what these stand for, by name."""
    shutil.copytree(tiny_model.folder("paper"), folder)
    tensors, numbers = {}, {}
    for name, array in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name and "layers" in name and "vision" not in name:
            *codes, numbers[name] = codes_of(array.astype(np.float32))
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{kind}": part for kind, part in pack(*codes).items()}
        else:
            tensors[name] = array
    save_file(
        {n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors"
    )
    change(folder, quantization_config=said)
    return numbers


def change(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load(folder: Path, narrow: str | None):
    bundle, published = folders.open_model(folder, compute_dtype="float32")
    params = import_hf.load_params(bundle, published, dtype="float32", narrow=narrow, unrolled=True)
    shapes = import_hf.shapes(bundle, published, dtype="float32", narrow=narrow)
    kinds = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (shapes, params))
    assert next(kinds) == next(kinds)
    return params


@pytest.fixture(scope="module")
def awq(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("awq") / "model"
    return folder, write(folder, AWQ, awq_parts)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_numbers_are_those_that_the_tools_multiply_with(kind: str) -> None:
    parts = folders.open_parts(GOLDEN / "backbones" / "clip", GOLDEN / "codes" / kind)
    published = parts[2][1].tensors
    expected = load_file(GOLDEN / "codes" / kind / "expected.safetensors")
    assert len(expected) == 7 and not any("qweight" in name for name in published)
    for name, numbers in expected.items():
        tensor = published[name]
        assert (tensor.shape, tensor.dtype) == (numbers.shape, np.float16)
        np.testing.assert_array_equal(tensor.read(), numbers)
        part = (slice(3, 21), slice(7, 40))
        np.testing.assert_array_equal(tensor.read(part), numbers[part])
        kept = int4.dequantize(jax.tree.map(jax.numpy.asarray, tensor.int4()))
        np.testing.assert_array_equal(np.asarray(kept).astype(np.float16), numbers)


def check(params, numbers: dict[str, np.ndarray]) -> None:
    """Every decoder weight of an unrolled tree is what its codes stand for."""
    found = {}
    for component, front in (("llm", "model.layers"), ("prefusion", "model.prefusion_layers")):
        layer = getattr(params, component).layers[0]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            module = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            found[f"{front}.0.{module}.{name}.weight"] = getattr(layer, name)
    assert set(found) == set(numbers)
    for name, leaf in found.items():
        got = int4.dequantize(leaf) if isinstance(leaf, Int4Weight) else leaf
        np.testing.assert_array_equal(np.asarray(got).reshape(numbers[name].shape), numbers[name])


def test_codes_are_kept_in_int4_and_numbers_in_floats(awq) -> None:
    folder, numbers = awq
    floats, kept = load(folder, None), load(folder, "int4")
    check(floats, numbers)
    check(kept, numbers)
    assert isinstance(kept.llm.layers[0].down_proj, Int4Weight)  # 48 inputs, in its own groups
    rounded = load(folder, "int8").llm.layers[0].q_proj
    step = np.abs(numbers["model.layers.0.self_attn.q_proj.weight"]).max(1) / 127
    np.testing.assert_allclose(np.asarray(rounded.scale).reshape(-1), step, rtol=1e-6)


def test_a_model_answers_with_its_codes(awq) -> None:
    folder, _ = awq
    cfg = tiny_model.bundle("paper").model
    inputs = tiny.batch([tiny.example(0, 9, {2: 1}, cfg)], cfg).inputs
    floats, kept = load(folder, None), load(folder, "int4")
    llm, prefusion = floats.llm, floats.prefusion
    for component, own in (("llm", kept.llm), ("prefusion", kept.prefusion)):
        floats = floats.replace(
            **{component: getattr(floats, component).replace(layers=own.layers)}
        )
    expected = tiny.logits(floats.replace(llm=llm, prefusion=prefusion), inputs, cfg)
    np.testing.assert_allclose(tiny.logits(floats, inputs, cfg), expected, atol=1e-3)


@pytest.mark.parametrize(
    "said, less",
    [
        (GPTQ, 1),
        (GPTQ | {"checkpoint_format": "gptq", "desc_act": True, "static_groups": True}, 1),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, 0),
    ],
    ids=["gptq", "in order", "gptq_v2"],
)
def test_gptq_and_its_second_format(tmp_path: Path, said: dict, less: int) -> None:
    numbers = write(tmp_path / "m", said, lambda *codes: gptq_parts(*codes, less=less))
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(said))
    check(load(tmp_path / "m", "int4"), numbers)
    check(load(tmp_path / "m", None), numbers)


def test_split_over_devices(awq) -> None:
    folder, numbers = awq
    with jax.set_mesh(sharding.make_mesh(1, 1, 2)):
        params = load(folder, "int4")
        assert params.llm.layers[0].q_proj.values.sharding.spec[0] == "tensor"
        check(jax.tree.map(np.asarray, params), numbers)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(bits=8), '"bits" is 8, but its codes have another size'),
        (dict(bits=None), 'no field "bits"'),
        (dict(version="gemv"), "\"version\" is 'gemv', but its codes are in another order"),
        (dict(backend="llm-awq"), "\"backend\" is 'llm-awq'"),
        (dict(zero_point=False), '"zero_point" is False'),
        (dict(group_size=0), '"group_size" is 0, expected an even number'),
        (dict(group_size=7), '"group_size" is 7, expected an even number'),
        (dict(group_size=12), "need int32 (32, 2)|in groups of 12"),
        (dict(group_size=8), "in groups of 8 need"),
        (dict(zeropoint=True), 'not known here and may change .*"zeropoint"'),
        (dict(modules_to_not_convert=["o_proj"]), "o_proj has codes, but also a weight, or"),
        (dict(modules_to_not_convert="o_proj"), '"modules_to_not_convert"'),
        (dict(quant_method="fp8"), r"\(fp8\): quantized weights cannot be read, but for"),
        (dict(quant_method="compressed-tensors"), r"\(compressed-tensors\)"),
        (GPTQ | dict(checkpoint_format="marlin"), "\"checkpoint_format\" is 'marlin'"),
        (GPTQ | dict(is_marlin_format=True), '"is_marlin_format" is True'),
        (GPTQ | dict(dynamic={"-:.*q_proj": {}}), '"dynamic" is'),
        (GPTQ | dict(checkpoint_format="gptq", format="gptq_v2"), 'expected what "checkpoint_'),
    ],
    ids=str,
)
def test_other_forms_are_refused_by_name(awq, tmp_path: Path, fields: dict, said: str) -> None:
    shutil.copytree(awq[0], tmp_path / "m")
    base = {} if fields.get("quant_method") == "gptq" else AWQ
    change(tmp_path / "m", quantization_config=base | fields)
    with pytest.raises(InputError, match=said) as error:
        folders.open_model(tmp_path / "m", compute_dtype="float32")
    assert "\n" not in str(error.value)


Q_PROJ = "model.layers.0.self_attn.q_proj"


def without(tensors: Tensors, kind: str) -> None:
    del tensors[f"{Q_PROJ}.{kind}"]


def turned(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.g_idx"] = tensors[f"{Q_PROJ}.g_idx"][::-1].copy()


def fifteen(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.qzeros"][0, 0] |= 15


def twice(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.weight"] = np.zeros((32, 32), np.float16)


def longer(tensors: Tensors) -> None:
    scales = tensors[f"{Q_PROJ}.scales"]
    tensors[f"{Q_PROJ}.scales"] = np.concatenate([scales, scales])


def halved(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"].view(np.int16)


def plain(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        del tensors[name]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda tensors: without(tensors, "qzeros"), f"has no {Q_PROJ}.qzeros:"),
        (lambda tensors: without(tensors, "scales"), f"has no {Q_PROJ}.scales:"),
        (turned, "groups that are not contiguous"),
        (fifteen, "zeros stored as 15"),
        (twice, "has codes, but also a weight"),
        (longer, r"scales is float16 \(4, 32\), but codes of 32 outputs and 32 inputs"),
        (halved, "qweight is int16"),
        (plain, "says gptq, but no file holds a .qweight"),
    ],
)
def test_damaged_codes_are_refused(tmp_path: Path, spoil: Callable, said: str) -> None:
    folder = tmp_path / "m"
    write(folder, GPTQ, gptq_parts)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=said):
        folders.open_model(folder, compute_dtype="float32")


def test_order_of_inputs_must_be_told(tmp_path: Path) -> None:
    def forgotten(*codes: np.ndarray) -> Tensors:
        parts = gptq_parts(*codes)
        del parts["g_idx"]
        return parts

    write(tmp_path / "m", GPTQ | {"desc_act": True}, forgotten)
    with pytest.raises(InputError, match="desc_act"):
        folders.open_model(tmp_path / "m", compute_dtype="float32")


def test_a_file_beside_must_agree(awq, tmp_path: Path) -> None:
    shutil.copytree(awq[0], tmp_path / "m")
    beside = tmp_path / "m" / "quant_config.json"
    beside.write_text(json.dumps(dict(w_bit=4, q_group_size=GROUP, version="GEMM")))
    folders.open_model(tmp_path / "m", compute_dtype="float32")
    for fields, name in ((dict(w_bit=3), "w_bit"), (dict(q_group_size=128), "group_size")):
        beside.write_text(json.dumps(fields))
        with pytest.raises(InputError, match=f"says another {name} than"):
            folders.open_model(tmp_path / "m", compute_dtype="float32")


def test_a_tower_is_no_decoder(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "backbones" / "clip", tmp_path / "clip")
    change(tmp_path / "clip", quantization_config=AWQ)
    with pytest.raises(InputError, match=r"\(awq\): quantized weights cannot be read, but for"):
        folders.open_parts(tmp_path / "clip", GOLDEN / "codes" / "awq")


def test_paths_of_codes_are_those_of_the_model(awq) -> None:
    names = paths(load(awq[0], "int4"))
    assert "llm/layers/0/q_proj/zero" in names and "llm/lm_head/scale" in names
