"""Weights as int8 and int4: rounding, which weights, and that models compute with these numbers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import sharding
from llava_mini_jax.cost import inference_memory
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.einsum import Int8Weight, einsum
from llava_mini_jax.ops.int4 import Int4Weight
from llava_mini_jax.params import ParamSpec, zeros
from llava_mini_jax.weights import folders, import_hf
from llava_mini_jax.weights.quantize import channel_axes, group_of, quantize, quantize_parts
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

# The same products in another order of multiplication, in float32, with logits of order 5.
LOGITS_ATOL = 5e-5


def is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Int8Weight | Int4Weight)


def restored(weight: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """What a narrow weight stands for, in float32; int4 knows no axes of inputs: their `shape`."""
    if isinstance(weight, Int4Weight):
        return int4.dequantize(weight).reshape(shape or (*weight.scale.shape[:-1], -1))
    if not is_narrow(weight):
        return weight
    inputs = range(weight.scale.ndim, weight.values.ndim)
    return weight.values * jnp.expand_dims(weight.scale, tuple(inputs))


def restored_all(params: LlavaMini, dialect: str) -> LlavaMini:
    spec = llava_mini.spec(tiny_model.bundle(dialect).model)
    if isinstance(params.llm.layers, tuple):
        spec = llava_mini.unrolled(spec)
    return jax.tree.map(
        lambda weight, one: restored(weight, one.shape), params, spec, is_leaf=is_narrow
    )


def load(folder: Path, narrow: str | None, unrolled: bool = True) -> LlavaMini:
    bundle, published = folders.open_model(folder, compute_dtype="float32")
    return import_hf.load_params(
        bundle, published, dtype="float32", narrow=narrow, unrolled=unrolled
    )


def logits(params: LlavaMini, dialect: str) -> np.ndarray:
    cfg = tiny_model.bundle(dialect).model
    kinds = [{1: 1}, {0: 1, 2: 1}, {}, {3: 1}]
    examples = [tiny.example(n, 5 + n, kind, cfg) for n, kind in enumerate(kinds)]
    return np.asarray(tiny.logits(params, tiny.batch(examples, cfg).inputs, cfg))


def test_a_weight_is_off_by_half_a_step_of_its_channel() -> None:
    exact = np.random.default_rng(0).normal(size=(5, 2, 8)) * np.logspace(-4, 2, 10).reshape(
        5, 2, 1
    )
    exact[3, 1] = 0
    found = quantize(jnp.asarray(exact, jnp.float32), 2)
    values, scale = np.asarray(found.values), np.asarray(found.scale)
    assert values.dtype == np.int8 and scale.shape == (5, 2)
    largest = np.abs(values).max(-1)
    assert largest[3, 1] == 0 and (np.delete(largest, 7) == 127).all()
    # Half a step, and float32's rounding of numbers up to 127 steps.
    assert (np.abs(values * scale[..., None] - exact) <= (0.5 + 1e-4) * scale[..., None]).all()


def test_an_int4_weight_is_off_by_half_a_step_of_its_group() -> None:
    sizes = np.logspace(-3, 3, 24).reshape(4, 2, 3, 1)
    exact = np.random.default_rng(0).normal(size=(4, 2, 3, 64)) * sizes
    exact[0, 0, 0] += 5 * sizes[0, 0, 0]  # all above 0
    exact[1, 1, 2, 7] = 0
    exact[3, 1] = 0
    found = quantize(jnp.asarray(exact.reshape(4, 2, 192), jnp.float32), 2, "int4")
    assert (found.values.shape, found.scale.shape) == ((4, 2, 32, 3), (4, 2, 3))
    assert (found.values.dtype, found.zero.dtype) == (np.uint8, np.uint8)
    assert found.values.nbytes + found.scale.nbytes + found.zero.nbytes == 24 * 35
    numbers = np.asarray(restored(found, exact.shape))
    assert numbers[1, 1, 2, 7] == 0 and not numbers[3, 1].any()
    # Half a step, what the zero was rounded by, and float16's rounding of up to 15 steps.
    assert (np.abs(numbers - exact) <= 0.51 * np.asarray(found.scale, np.float32)[..., None]).all()


def test_groups_divide_the_inputs() -> None:
    assert [group_of(n) for n in (4096, 11008, 96, 14, 48)] == [64, 64, 32, None, None]
    with pytest.raises(ValueError, match="48 inputs make no groups of 64 or 32"):
        quantize(jnp.ones((3, 48)), 1, "int4")


@pytest.mark.parametrize(
    ("equation", "weight", "axes"),
    [
        ("BTD,NHD->BTNH", (4, 3, 8), ("batch", None, "heads", None)),
        ("BTNH,DNH->BTD", (8, 4, 3), ("batch", None, None)),
        ("BTD,VD->BTV", (12, 8), ("batch", None, "vocab")),
    ],
)
def test_a_product_is_that_of_the_restored_weight(equation, weight, axes) -> None:
    rng = np.random.default_rng(1)
    exact = jnp.asarray(
        rng.normal(size=weight) * rng.uniform(0.1, 10, (weight[0], *[1] * (len(weight) - 1)))
    )
    rounded = quantize(exact, 2 if equation == "BTD,NHD->BTNH" else 1)
    sizes = dict(zip(equation.split("->")[0].split(",")[1], weight, strict=True)) | {"B": 2, "T": 5}
    x = jnp.asarray(rng.normal(size=[sizes[letter] for letter in equation.split(",")[0]]))
    found = einsum(equation, x, rounded, axes)
    np.testing.assert_allclose(
        found, jnp.einsum(equation, x, restored(rounded)), rtol=1e-5, atol=1e-4
    )
    half = einsum(equation, x.astype(jnp.bfloat16), rounded, axes)
    assert half.dtype == jnp.bfloat16  # its three digits: one rounding of x, one of the product
    np.testing.assert_allclose(
        half.astype(jnp.float32), found, rtol=0.02, atol=0.02 * np.abs(found).max()
    )


@pytest.mark.parametrize(
    ("shape", "form"),
    [((7, 3, 40), "int8"), ((101, 24), "int8"), ((1, 16), "int8"), ((7, 3, 96), "int4")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_rounded_in_parts_is_the_same(shape, form, dtype, monkeypatch) -> None:
    monkeypatch.setattr("llava_mini_jax.weights.quantize.TOGETHER", 3 * math.prod(shape[1:]))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    read: list[slice] = []

    def rows(part: slice) -> jax.Array:
        read.append(part)
        return jnp.copy(weight[part])

    channels = len(shape) - 1
    found = quantize_parts(rows, shape, channels, form)
    whole = quantize(jnp.copy(weight), channels, form)
    assert [part.start for part in read] == list(range(0, shape[0], 3))
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    kinds = (jax.tree.map(lambda part: part.dtype, each) for each in (found, whole))
    assert next(kinds) == next(kinds)


def test_output_features_stand_first() -> None:
    def axes(shape: tuple[int, ...], outputs: int, first: str | None = None) -> int:
        spec = ParamSpec(shape, (first, *[None] * (len(shape) - 1)), zeros)
        return channel_axes(spec, outputs)

    assert [axes((4, 3, 8), 12), axes((8, 4, 3), 8), axes((9, 2, 2, 3), 9)] == [2, 1, 1]
    assert [axes((5, 4, 3, 8), 12, "layers"), axes((4, 4, 4), 4, "layers")] == [3, 2]
    with pytest.raises(ValueError, match="7 output features"):
        axes((4, 3, 8), 7)


def leaves_of(params: LlavaMini) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_narrow)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("dialect", ["paper", "release", "llava-1.5"])
def test_weights_of_products_are_int8_and_nothing_else(dialect) -> None:
    folder, cfg = tiny_model.folder(dialect), tiny_model.bundle(dialect).model
    params = load(folder, "int8")
    found = leaves_of(params)
    names = {path.rsplit("/", 1)[-1] for path, leaf in found.items() if is_narrow(leaf)}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == projections | {"lm_head", "patch_embed", "kernel"}
    for path, leaf in found.items():
        if path.endswith("layers/0/q_proj"):
            assert leaf.scale.shape == leaf.values.shape[:2], path
        elif path.endswith(("layers/0/o_proj", "down_proj", "lm_head", "patch_embed")):
            assert leaf.scale.shape == leaf.values.shape[:1], path
    stated = inference_memory.weight_bytes(cfg, "int8")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == sum(stated.values())


def test_int4_is_for_decoder_layers_whose_inputs_make_groups() -> None:
    """The tiny model's MLP is 48 wide: `down_proj` stays int8, as tower and head do."""
    params = load(tiny_model.folder("paper"), "int4")
    found = leaves_of(params)
    kinds = {
        kind: {path.replace("/0/", "/") for path, leaf in found.items() if isinstance(leaf, kind)}
        for kind in (Int4Weight, Int8Weight)
    }
    wide = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    assert kinds[Int4Weight] == {f"{c}/layers/{n}" for c in ("llm", "prefusion") for n in wide}
    assert {"llm/lm_head", "llm/layers/down_proj", "vision/patch_embed"} < kinds[Int8Weight]
    assert "vision/layers/q_proj/kernel" in kinds[Int8Weight]
    stated = inference_memory.weight_bytes(tiny_model.bundle("paper").model, "int4")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == sum(stated.values())
    bundle, published = folders.open_model(tiny_model.folder("paper"), compute_dtype="float32")
    shapes = import_hf.shapes(bundle, published, dtype="float32", narrow="int4")
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize(
    "dialect, narrow",
    [
        ("release", "int8"),
        ("paper", "int4"),
        pytest.param("paper", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_model_computes_with_the_rounded_weights(dialect, narrow) -> None:
    folder = tiny_model.folder(dialect)
    params = load(folder, narrow)
    expected = logits(restored_all(params, dialect), dialect)
    np.testing.assert_allclose(logits(params, dialect), expected, atol=LOGITS_ATOL)
    exact = logits(load(folder, None), dialect)
    off = np.abs(expected - exact).max() / np.abs(exact).max()
    assert 1e-4 < off < (0.1 if narrow == "int8" else 0.5)
    stacked = load(folder, narrow, unrolled=False)
    np.testing.assert_allclose(logits(stacked, dialect), expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize(
    "mesh, narrow",
    [
        ((1, 1, 2), "int8"),
        ((2, 2, 2), "int4"),
        pytest.param((2, 2, 2), "int8", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_split_over_devices(mesh, narrow) -> None:
    folder = tiny_model.folder("release")
    expected = logits(load(folder, narrow), "release")
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        params = load(folder, narrow)
        q_proj = params.llm.layers[0].q_proj
        assert q_proj.values.sharding.spec[0] == q_proj.scale.sharding.spec[0] == "tensor"
        found = logits(params, "release")
    np.testing.assert_allclose(found, expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize("narrow", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_questions_are_answered(narrow) -> None:
    folder = tiny_model.folder("paper")
    model = llava_mini_jax.load(folder, dtype=narrow)
    assert (model.weights_dtype, model.bundle.model.compute_dtype) == (narrow, "float32")
    params = restored_all(model.params, "paper")
    same = dataclasses.replace(model, params=params)
    assert same.weights_dtype == "float32"
    pictures = [tiny_model.picture(seed) for seed in range(2)]
    answers = [m.generate("which?", images=pictures, max_new_tokens=24) for m in (model, same)]
    assert answers[0] == answers[1] != ""
    session = llava_mini_jax.Session(model)
    for picture in pictures:
        session.show_image(picture)
    assert "".join(session.ask("which?")).startswith(answers[0])
