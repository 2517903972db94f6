"""Summaries that leave the layers against a full attention tensor, and the rules behind them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.analysis import attention
from llava_mini_jax.analysis.attention import KINDS, MAP_BINS
from llava_mini_jax.data.batches.examples import Buckets
from llava_mini_jax.models import decoder, llava_mini
from llava_mini_jax.ops import masks
from llava_mini_jax.ops.attention import under
from llava_mini_jax.ops.rope import angles, rotate
from llava_mini_jax.params import unstack
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

ATOL = 1e-5  # of float32 sums over some dozens of positions


@functools.partial(jax.jit, static_argnames="cfg")
def full_attention(params, batch, cfg):
    """[L, B, S, S] of every layer by hand, without ops/attention.py; and the mask."""
    x_BSD = llava_mini.embed_inputs(params, batch.inputs, cfg)
    valid_BS = batch.inputs.slots_BS >= 0
    mask_BTS = masks.causal(valid_BS)
    turns = angles(masks.running_positions(valid_BS), cfg.llm.head_width, cfg.llm.rope)
    found = []
    for layer in unstack(params.llm.layers):
        y = x_BSD * jax.lax.rsqrt((x_BSD**2).mean(-1, keepdims=True) + cfg.llm.norm_eps)
        y = y * layer.attn_norm
        q = rotate(jnp.einsum("BTD,NHD->BTNH", y, layer.q_proj), turns)
        k = rotate(jnp.einsum("BTD,KHD->BTKH", y, layer.k_proj), turns)
        k = jnp.repeat(k, cfg.llm.heads // cfg.llm.kv_heads, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / cfg.llm.head_width**0.5
        weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -1e30), axis=-1)
        found.append(weights.mean(axis=1))
        x_BSD, _ = decoder.block(decoder.Layer(layer, None), x_BSD, turns, under(mask_BTS), cfg.llm)
    return jnp.stack(found), mask_BTS


def by_hand(weights_LBTS, mask_BTS, kinds_BS):
    """Attention, entropy and evenness by loops over queries."""
    L, J = len(weights_LBTS), len(KINDS)
    sums = np.zeros((3, L, J, J))
    counted = np.zeros((L, J, J))
    tokens = np.zeros(J)
    for b, t in zip(*np.nonzero(kinds_BS >= 0), strict=True):
        j = kinds_BS[b, t]
        tokens[j] += 1
        for k in range(J):
            keys = (kinds_BS[b] == k) & mask_BTS[b, t]
            for layer in range(L):
                a = weights_LBTS[layer, b, t, keys]
                sums[0, layer, j, k] += a.sum()
                if len(a) > 1:
                    p = a / a.sum()
                    entropy = -(p * np.log(p)).sum()
                    counted[layer, j, k] += 1
                    sums[1, layer, j, k] += entropy
                    sums[2, layer, j, k] += entropy / np.log(len(a))
    with np.errstate(invalid="ignore"):
        return sums[0] / tokens[:, None], sums[1] / counted, sums[2] / counted


@pytest.fixture(params=["paper", "release", "llava-1.5"])
def world(request):
    """(params unrolled, bundle, four examples with answers) of a model with two layers."""
    dialect = request.param
    cfg = tiny.model(dialect)
    bundle = dataclasses.replace(tiny_model.bundle(dialect), model=cfg)
    if dialect == "release":
        prompt = dataclasses.replace(bundle.prompt, padding_side="left")
        bundle = dataclasses.replace(bundle, prompt=prompt)
    params = llava_mini.unrolled(tiny.on_device(tiny.weights(cfg)))
    marks = ({2: 1}, {0: 1, 5: 1}, {1: 2})
    examples = [tiny.example(i, 9 + i, m, cfg, answer=2 + i) for i, m in enumerate(marks)]
    return params, bundle, examples


def test_summaries_are_those_of_a_full_attention_tensor(world):
    params, bundle, examples = world
    batch = tiny.batch(
        examples,
        bundle.model,
        buckets=Buckets(lengths=(16, 64), images=(2,)),
        padding_side=bundle.prompt.padding_side,
    )
    kinds_BS = np.asarray(attention.kinds(batch))
    weights_LBTS, mask_BTS = full_attention(params, batch, bundle.model)
    expected = by_hand(np.asarray(weights_LBTS, float), np.asarray(mask_BTS), kinds_BS)
    # Two batches of two, the second one half empty, must come to the same as one of three.
    found = attention.by_layer(params, bundle, examples, batch_size=2)
    for values, name in zip(expected, ("attention", "entropy", "evenness"), strict=True):
        np.testing.assert_allclose(getattr(found, f"{name}_LJK"), values, atol=ATOL, err_msg=name)
    assert found.examples == 3
    assert found.tokens_J.tolist() == [(kinds_BS == k).sum() for k in range(3)]
    np.testing.assert_allclose(found.attention_LJK.sum(axis=-1), 1, atol=ATOL)


def test_the_map_is_the_first_examples_attention(world):
    params, bundle, examples = world
    found = attention.by_layer(params, bundle, examples[:1], batch_size=1)
    batch = tiny.batch(
        examples[:1],
        bundle.model,
        buckets=Buckets(lengths=(64,), images=(1,)),
        padding_side=bundle.prompt.padding_side,
    )
    real = np.flatnonzero(np.asarray(attention.kinds(batch))[0] >= 0)
    assert 8 < len(real) < MAP_BINS
    weights_LBTS, _ = full_attention(params, batch, bundle.model)
    expected = np.asarray(weights_LBTS)[:, 0][:, real][:, :, real]
    np.testing.assert_allclose(found.map_LGG, expected, atol=ATOL)
    assert found.map_kinds_G.tolist() == np.asarray(attention.kinds(batch))[0][real].tolist()


def test_uniform_attention_has_the_entropy_of_its_length():
    n = 12
    kinds_BSK = jax.nn.one_hot(jnp.array([[0] * 2 + [1] * 6 + [2] * 4]), len(KINDS))
    uniform = jnp.full((1, n, n), 1 / n)
    bins = np.eye(n, dtype=np.float32)
    found = attention.summarise(uniform, kinds_BSK, jnp.ones((1, n, n), bool), bins)
    entropy_JK = np.asarray(found.entropy_JK / found.counted_JK)
    np.testing.assert_allclose(entropy_JK, np.log([[2, 6, 4]] * 3), rtol=1e-6)
    np.testing.assert_allclose(found.evenness_JK, found.counted_JK, rtol=1e-6)
    one = jax.nn.one_hot(jnp.full((1, n), 3), n)
    found = attention.summarise(one, kinds_BSK, jnp.ones((1, n, n), bool), bins)
    assert float(jnp.abs(found.entropy_JK).max()) == 0
    assert np.asarray(found.counted_JK)[:, [0, 2]].max() == 0  # no attention, no entropy


def test_long_sequences_are_drawn_in_bins_whose_rows_sum_to_one():
    n = MAP_BINS * 2 + 17
    kinds_S = np.array([-1] * 5 + [0] * 7 + [1] * (n - 7))
    bins = attention._bins(kinds_S)
    weights = np.tril(np.ones((n + 5, n + 5), np.float32))
    weights[:, :5] = 0
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)
    found = attention.summarise(
        jnp.asarray(weights)[None],
        jax.nn.one_hot(jnp.asarray(kinds_S), 3)[None],
        jnp.asarray(weights > 0)[None],
        jnp.asarray(bins),
    )
    np.testing.assert_allclose(np.asarray(found.map_GG).sum(axis=1), 1, atol=ATOL)
    assert bins.sum() == n and bins.sum(axis=0).min() >= 2
    assert len(attention._kinds_of_bins(kinds_S)) == MAP_BINS


def test_observing_changes_nothing(world):
    params, bundle, _ = world
    cfg = bundle.model
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 32)), jnp.float32)
    turns = angles(jnp.arange(7)[None], cfg.llm.head_width, cfg.llm.rope)
    mask = under(masks.causal(jnp.ones((1, 7), bool)))
    layer = decoder.Layer(params.llm.layers[0], None)
    plain, _ = decoder.block(layer, x, turns, mask, cfg.llm)
    seen, (memory, shapes) = decoder.block(
        layer, x, turns, mask, cfg.llm, observe=lambda q, k: (q.shape, k.shape)
    )
    assert (plain == seen).all() and memory is None
    assert shapes == ((1, 7, 4, 8), (1, 2, 7, 8))
