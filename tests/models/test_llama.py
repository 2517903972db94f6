"""LLaMA: unrolled layers, recomputation and repeated key heads change nothing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.models import llama, llava_mini
from tests import tiny

fast_compilation = tiny.fast_compilation

# The same float32 sums of values of order 1 in another order, through two layers.
ATOL = 1e-5
# Gradients, relative to the largest of their tensor: the same, through the backward pass.
GRADIENT_RTOL = 1e-5
# For gradients that are zero but for rounding, as that of a key bias under a softmax.
GRADIENT_ATOL = 1e-7

CFG = tiny.release_model()
LLM = CFG.llm
B, T = 3, 9


@pytest.fixture(scope="module")
def params() -> llama.Llama:
    return tiny.on_device(tiny.weights(CFG).llm)


@pytest.fixture(scope="module")
def embeddings() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, T, LLM.width)), jnp.float32)


apply = jax.jit(llama.apply, static_argnames="cfg")

VALID = np.arange(T) < np.array([[9], [4], [7]])  # right padding


def test_what_is_not_valid_is_not_read(params, embeddings) -> None:
    before = np.asarray(apply(params, embeddings, VALID, LLM))
    noise = jnp.where(VALID[..., None], embeddings, 100.0)
    after = np.asarray(apply(params, noise, VALID, LLM))
    np.testing.assert_array_equal(before[VALID], after[VALID])


def test_later_positions_do_not_change_earlier_ones(params, embeddings) -> None:
    valid = np.ones((B, T), bool)
    before = apply(params, embeddings, valid, LLM)
    after = apply(params, embeddings.at[:, 6].add(1.0), valid, LLM)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max(axis=(0, 2)).min() > 1e-3


def test_scanned_equals_unrolled(params, embeddings) -> None:
    tree = llava_mini.unrolled(tiny.weights(CFG)).llm
    assert len(tree.layers) == LLM.layers and isinstance(tree.layers, tuple)
    scanned = apply(params, embeddings, VALID, LLM)
    np.testing.assert_allclose(apply(tree, embeddings, VALID, LLM), scanned, atol=ATOL)


def test_grouped_heads_equal_repeated_ones(params, embeddings) -> None:
    groups = LLM.heads // LLM.kv_heads
    assert groups == 2
    layers = params.layers.replace(
        k_proj=jnp.repeat(params.layers.k_proj, groups, axis=1),
        v_proj=jnp.repeat(params.layers.v_proj, groups, axis=1),
    )
    full = dataclasses.replace(LLM, kv_heads=LLM.heads)
    np.testing.assert_allclose(
        apply(params.replace(layers=layers), embeddings, VALID, full),
        apply(params, embeddings, VALID, LLM),
        atol=ATOL,
    )


def test_a_tied_head_is_the_embedding_table(params, embeddings) -> None:
    tied = dataclasses.replace(LLM, tied_head=True)
    assert llama.spec(tied).lm_head is None
    assert (
        param_tree.count(llama.spec(LLM)) - param_tree.count(llama.spec(tied))
        == LLM.vocab_size * LLM.width
    )
    found = llama.logits(params.replace(lm_head=None), embeddings)
    expected = np.asarray(embeddings) @ np.asarray(params.embed_tokens).T
    np.testing.assert_allclose(found, expected, atol=ATOL)
    untied = np.asarray(embeddings) @ np.asarray(params.lm_head).T
    np.testing.assert_allclose(llama.logits(params, embeddings), untied, atol=ATOL)


def test_marks_are_embedded_as_id_zero(params) -> None:
    found = llama.embed(params, jnp.array([[5, -200, 0]]), jnp.dtype("bfloat16"))
    assert found.dtype == jnp.bfloat16
    table = params.embed_tokens.astype(jnp.bfloat16)
    np.testing.assert_array_equal(found[0], table[jnp.array([5, 0, 0])])


def test_logits_are_float32(params, embeddings) -> None:
    assert llama.logits(params, embeddings.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.slow  # one layer's loss and gradients: tests/ops/test_layers.py
@pytest.mark.parametrize("remat", ["matmuls", "attention", "full"])
def test_remat_gives_the_same_loss_and_gradients(remat) -> None:
    params, batch = tiny.weights(CFG), tiny.training_batch(CFG)
    plain = tiny.loss_and_grads(params, batch, CFG)
    again = tiny.loss_and_grads(params, batch, dataclasses.replace(CFG, remat=remat))
    assert float(plain[0]) == pytest.approx(float(again[0]), abs=ATOL)
    expected = param_tree.paths(plain[1])
    for path, found in param_tree.paths(again[1]).items():
        atol = GRADIENT_ATOL + GRADIENT_RTOL * float(jnp.abs(expected[path]).max())
        np.testing.assert_allclose(found, expected[path], rtol=0, atol=atol, err_msg=path)


def test_remat_reaches_every_stack_of_layers() -> None:
    params, batch = tiny.weights(CFG), tiny.training_batch(CFG)

    def recomputed(cfg) -> int:
        program = jax.make_jaxpr(functools.partial(tiny.loss_and_grads, cfg=cfg))(params, batch)
        return len(re.findall(r"= (?:remat|checkpoint)\w*\[", str(program)))

    # Scans of the LLM and of pre-fusion over text; over images the last layer is by itself.
    assert recomputed(CFG) == 0
    assert recomputed(dataclasses.replace(CFG, remat="full")) == 1 + 1 + 2


@pytest.mark.parametrize("mesh", [(1, 1, 4), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("ids", [[[3]], [[-200]], [[3, 5]]])
def test_one_id_on_a_mesh_of_gpus(params, mesh, ids, monkeypatch) -> None:
    """Looked up twice there, so that the table stays in its pieces; one row comes out."""
    right = np.asarray(params.embed_tokens)[np.maximum(ids, 0)]
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        table = sharding.place(params.embed_tokens, ("vocab", "embed"))
        placed = dataclasses.replace(params, embed_tokens=table)
        found = jax.jit(lambda p, i: llama.embed(p, i, jnp.float32))(placed, np.array(ids))
        text = str(
            jax.make_jaxpr(lambda p, i: llama.embed(p, i, jnp.float32))(placed, np.array(ids))
        )
    np.testing.assert_array_equal(found, right)
    assert ("optimization_barrier" in text) == (np.size(ids) == 1)
