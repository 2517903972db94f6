"""cuDNN's fused attention (CUDA): scores of queries by keys never lie in memory.

`jax.nn.dot_product_attention` takes arrays [B, T, N, H] and either causality from slot 0 on or a
dense mask, which it adds to the scores in half precision: one array [B or 1, 1, T, S] for all
heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import Array

DTYPES = ("bfloat16", "float16")
WIDTH_STEP, WIDEST = 8, 128  # head widths: multiples, and the most before Hopper
WINDOWS = True  # a part of the dense mask
OLDEST = 8  # compute capability: Ampere


def missing() -> str:
    """Why the GPU that is here cannot run it, "" if it can, or if none is here to be asked."""
    if jax.default_backend() != "gpu":
        return ""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return f"it is CUDA's, and this is a {device.device_kind}"
    major = int(device.compute_capability.split(".")[0])
    if major < OLDEST:
        return f"it needs compute capability {OLDEST}.0, and this GPU has {major}"
    return ""


def attention(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask: Mask) -> Array:
    """ops/attention.py's `attention` on a CUDA device; any length, any mask."""
    T, S = q_BTNH.shape[1], k_BKSH.shape[2]
    whole = isinstance(mask.first, int) and mask.first == 0 and T == S
    causal = whole and mask.window is None
    rest = dataclasses.replace(mask, first=None) if causal else mask
    dense_BTS = rest.dense(T, S)
    # Gradients want even lengths. What is added stands last: causality hides it, or a mask does.
    odd_T, odd_S = (0, T % 2), (0, S % 2)
    if dense_BTS is None and S % 2 and not causal:
        dense_BTS = jnp.ones((1, T, S), bool)
    if dense_BTS is not None:
        dense_BTS = jnp.pad(dense_BTS, [(0, 0), odd_T, odd_S])
    q_BTNH = jnp.pad(q_BTNH, [(0, 0), odd_T, (0, 0), (0, 0)])
    k_BKSH, v_BKSH = (jnp.pad(x, [(0, 0), (0, 0), odd_S, (0, 0)]) for x in (k_BKSH, v_BKSH))
    return _run(q_BTNH, k_BKSH, v_BKSH, dense_BTS, causal)[:, :T]


def _run(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, dense_BTS: Array | None, causal: bool
) -> Array:
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    mask = None if dense_BTS is None else dense_BTS[:, None]
    one_mask = mask is None or mask.shape[0] == 1
    if T * N >= S * K or not one_mask:
        k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal, implementation="cudnn"
        )
    # A few queries before a long cache: not the cache is transposed but they are. Each key head
    # counts as a row of the batch, [B * K, S, 1, H], which is how it lies in memory.
    rows_RTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B * K, T, N // K, H)
    keys_RS1H, values_RS1H = (x.reshape(B * K, S, 1, H) for x in (k_BKSH, v_BKSH))
    mixed_RTGH = jax.nn.dot_product_attention(
        rows_RTGH, keys_RS1H, values_RS1H, mask=mask, is_causal=causal, implementation="cudnn"
    )
    return mixed_RTGH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)
