"""Weights as int8: rounding, which weights, and that a model computes with just those numbers."""

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
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.ops.einsum import Int8Weight, einsum
from llava_mini_jax.params import ParamSpec, zeros
from llava_mini_jax.weights import folders, import_hf
from llava_mini_jax.weights.quantize import channel_axes, quantize, quantize_parts
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

# The same products in another order of multiplication, in float32, with logits of order 5.
LOGITS_ATOL = 5e-5


def is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8Weight)


def restored(weight: Any) -> jax.Array:
    """What an int8 weight stands for, in float32."""
    if not is_int8(weight):
        return weight
    inputs = range(weight.scale.ndim, weight.values.ndim)
    return weight.values * jnp.expand_dims(weight.scale, tuple(inputs))


def load(folder: Path, int8: bool, dtype: str = "float32", unrolled: bool = True) -> LlavaMini:
    bundle, published = folders.open_model(folder, compute_dtype=dtype)
    return import_hf.load_params(bundle, published, dtype=dtype, int8=int8, unrolled=unrolled)


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


@pytest.mark.parametrize("shape", [(7, 3, 40), (101, 24), (1, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_rounded_in_parts_is_the_same(shape, dtype, monkeypatch) -> None:
    monkeypatch.setattr("llava_mini_jax.weights.quantize.TOGETHER", 3 * math.prod(shape[1:]))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    read: list[slice] = []

    def rows(part: slice) -> jax.Array:
        read.append(part)
        return jnp.copy(weight[part])

    channels = len(shape) - 1
    found, whole = quantize_parts(rows, shape, channels), quantize(jnp.copy(weight), channels)
    assert [part.start for part in read] == list(range(0, shape[0], 3))
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.scale, whole.scale)
    assert (found.values.dtype, found.scale.dtype) == (jnp.int8, jnp.float32)


def test_output_features_stand_first() -> None:
    def axes(shape: tuple[int, ...], outputs: int, first: str | None = None) -> int:
        spec = ParamSpec(shape, (first, *[None] * (len(shape) - 1)), zeros)
        return channel_axes(spec, outputs)

    assert [axes((4, 3, 8), 12), axes((8, 4, 3), 8), axes((9, 2, 2, 3), 9)] == [2, 1, 1]
    assert [axes((5, 4, 3, 8), 12, "layers"), axes((4, 4, 4), 4, "layers")] == [3, 2]
    with pytest.raises(ValueError, match="7 output features"):
        axes((4, 3, 8), 7)


@pytest.mark.parametrize("dialect", ["paper", "release", "llava-1.5"])
def test_weights_of_products_are_int8_and_nothing_else(dialect) -> None:
    folder, cfg = tiny_model.folder(dialect), tiny_model.bundle(dialect).model
    params = load(folder, int8=True)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_int8)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    names = {path.rsplit("/", 1)[-1] for path, leaf in found.items() if is_int8(leaf)}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == projections | {"lm_head", "patch_embed", "kernel"}
    for path, leaf in found.items():
        if path.endswith("layers/0/q_proj"):
            assert leaf.scale.shape == leaf.values.shape[:2], path
        elif path.endswith(("layers/0/o_proj", "down_proj", "lm_head", "patch_embed")):
            assert leaf.scale.shape == leaf.values.shape[:1], path
    weights = [leaf.values if is_int8(leaf) else leaf for leaf in found.values()]
    stated = inference_memory.weight_bytes(cfg, "int8")
    assert sum(leaf.nbytes for leaf in weights) == sum(stated.values())


@pytest.mark.parametrize("dialect", ["paper", "release"])
def test_a_model_computes_with_the_rounded_weights(dialect) -> None:
    folder = tiny_model.folder(dialect)
    params = load(folder, int8=True)
    expected = logits(jax.tree.map(restored, params, is_leaf=is_int8), dialect)
    np.testing.assert_allclose(logits(params, dialect), expected, atol=LOGITS_ATOL)
    exact = logits(load(folder, int8=False), dialect)
    assert 1e-3 < np.abs(expected - exact).max() < 0.1 * np.abs(exact).max()
    stacked = load(folder, int8=True, unrolled=False)
    np.testing.assert_allclose(logits(stacked, dialect), expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 2, 2)], ids=str)
def test_split_over_devices(mesh) -> None:
    folder = tiny_model.folder("release")
    expected = logits(load(folder, int8=True), "release")
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        params = load(folder, int8=True)
        q_proj = params.llm.layers[0].q_proj
        assert q_proj.values.sharding.spec[0] == q_proj.scale.sharding.spec[0] == "tensor"
        found = logits(params, "release")
    np.testing.assert_allclose(found, expected, atol=LOGITS_ATOL)


def test_questions_are_answered(tmp_path) -> None:
    folder = tiny_model.folder("paper")
    model = llava_mini_jax.load(folder, dtype="int8")
    assert (model.weights_dtype, model.bundle.model.compute_dtype) == ("int8", "float32")
    params = jax.tree.map(restored, model.params, is_leaf=is_int8)
    same = dataclasses.replace(model, params=params)
    assert same.weights_dtype == "float32"
    pictures = [tiny_model.picture(seed) for seed in range(2)]
    answers = [m.generate("which?", images=pictures, max_new_tokens=24) for m in (model, same)]
    assert answers[0] == answers[1] != ""
    session = llava_mini_jax.Session(model)
    for picture in pictures:
        session.show_image(picture)
    assert "".join(session.ask("which?")).startswith(answers[0])
