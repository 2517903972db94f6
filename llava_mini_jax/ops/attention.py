"""Softmax attention, grouped-query included. Fused kernels go behind this one function."""

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.params import Array

_QUERY = ("batch", None, "heads", None)
_MASK = ("batch", None, None)


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None) -> Array:
    """softmax(q k^T / sqrt(H)) v with softmax in float32; returns [B, T, N, H].

    N query heads share K key/value heads in groups of N/K. A query that may attend to nothing
    gets the mean of the values: finite, and no one reads it.
    """
    heads, kv_heads = q_BTNH.shape[2], k_BSKH.shape[2]
    # None: there is no mesh. P(None): there is one, and the axis stays whole on it.
    split_heads = sharding.partition((heads,), ("heads",)) not in (None, jax.P(None))
    if split_heads and sharding.partition((kv_heads,), ("heads",)) == jax.P(None):
        # Query heads are split over more devices than there are key heads: give each its own copy.
        k_BSKH, v_BSKH = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BSKH, v_BSKH))
    arrays, axes = (q_BTNH, k_BSKH, v_BSKH), (_QUERY, _QUERY, _QUERY)
    if mask_BTS is not None:
        arrays, axes = (*arrays, mask_BTS), (*axes, _MASK)
    return sharding.local(_attention, axes, _QUERY, *arrays)


def attention_weights(q_BTNH: Array, k_BSKH: Array, mask_BTS: Array) -> Array:
    """What `attention` weighs values with, averaged over heads: float32 [B, T, S]."""
    B, T, N, _ = q_BTNH.shape
    return _weights(q_BTNH, k_BSKH, mask_BTS).reshape(B, N, T, -1).mean(axis=1)


def _attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array | None = None) -> Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Float32 ends here: the product with the values runs in the activations' dtype.
    weights_BKRS = _weights(q_BTNH, k_BSKH, mask_BTS).astype(v_BSKH.dtype)
    mixed_BKRH = jnp.einsum("BKRS,BSKH->BKRH", weights_BKRS, v_BSKH)
    # Query head k * G + g reads key head k, as Hugging Face's repeat_kv pairs them.
    return mixed_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _weights(q_BTNH: Array, k_BSKH: Array, mask_BTS: Array | None) -> Array:
    """The softmax in float32 [B, K, G * T, S]: a group's heads one after another."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # The group folded into the rows: one plain batched product a key head, twice as fast on CPU as
    # an einsum with a group axis.
    rows_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    # Summed and left in float32: the softmax must not see scores rounded to bfloat16.
    scores_BKRS = jnp.einsum(
        "BKRH,BSKH->BKRS", rows_BKRH * H**-0.5, k_BSKH, preferred_element_type=jnp.float32
    )
    if mask_BTS is not None:
        scores_BKGTS = scores_BKRS.reshape(B, K, G, T, S)
        # Finite: over a row of nothing but -inf the softmax, and every gradient behind it, is NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
        scores_BKRS = scores_BKGTS.reshape(B, K, G * T, S)
    return jax.nn.softmax(scores_BKRS, axis=-1)
