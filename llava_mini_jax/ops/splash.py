"""Splash attention, JAX's kernel for TPUs: blocks of scores that nobody sees are not computed.

The kernel takes lengths that are multiples of 128 and a mask known to the compiler, causal from
some slot on; what depends on data (padding, packed sequences) it takes as segment ids: a query sees
keys of its own id alone. A cache's moving `first` fits neither: `_behind_cache` makes two calls.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.ops.layers import ATTENTION
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import Array

DTYPES = ("bfloat16", "float32")
WIDTH_STEP, WIDEST = 1, 256  # any head width: padded to a multiple of LANES / 2
# A window counts valid keys, which are data; the kernel's own local mask counts slots.
WINDOWS = False
LANES = 128
LARGEST_BLOCK = 1024  # queries or keys that a core holds at a time


def attention(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask: Mask, *, interpret: bool = False
) -> Array:
    """ops/attention.py's `attention` on a TPU, or, slowly, interpreted on any device.

    Has no gradient where `mask.first` is an array: only caches have that, and nothing trains there.
    """
    assert mask.window is None, "ops/attention.py refuses it"
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    # Zeros behind a head change no product, and what they add to the result is cut off again.
    q_BNTH = _padded(q_BTNH.swapaxes(1, 2) * H**-0.5, 3, LANES // 2)
    k_BKSH, v_BKSH = (_padded(x, 3, LANES // 2) for x in (k_BKSH, v_BKSH))
    call = _call if mask.first is None or isinstance(mask.first, int) else _behind_cache
    mixed_BNTH = call(q_BNTH, k_BKSH, v_BKSH, mask, interpret)
    return mixed_BNTH[:, :, :T, :H].swapaxes(1, 2)


def _behind_cache(
    q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, mask: Mask, interpret: bool
) -> Array:
    """Attention of T queries that stand in slots `first`, `first` + 1, ... of a cache.

    Every query sees the slots in front of all of them, and, causally, the T slots from `first` on:
    two calls whose softmaxes are put together by their normalisers.
    """
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    first, valid_BS = jnp.asarray(mask.first), mask.valid_BS
    assert mask.query_segments_BT is None, "packed sequences have no cache"
    valid_BS = jnp.ones((len(q_BNTH), S), bool) if valid_BS is None else valid_BS
    earlier = Mask(valid_BS=valid_BS & (jnp.arange(S) < first))
    own = Mask(first=0, valid_BS=jax.lax.dynamic_slice_in_dim(valid_BS, first, T, axis=1))
    k_BKTH, v_BKTH = (jax.lax.dynamic_slice_in_dim(x, first, T, axis=2) for x in (k_BKSH, v_BKSH))
    parts = [
        _call(q_BNTH, k_BKSH, v_BKSH, earlier, interpret, normaliser=True),
        _call(q_BNTH, k_BKTH, v_BKTH, own, interpret, normaliser=True),
    ]
    # Where nothing is seen the normaliser is hugely negative, and the part weighs nothing.
    highest = functools.reduce(jnp.maximum, (log_BNT for _, log_BNT in parts))
    weights = [jnp.exp(log_BNT - highest)[..., None] for _, log_BNT in parts]
    mixed = [mixed_BNTH.astype(jnp.float32) for mixed_BNTH, _ in parts]
    total = weights[0] * mixed[0] + weights[1] * mixed[1]
    return (total / (weights[0] + weights[1])).astype(q_BNTH.dtype)


def _call(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    mask: Mask,
    interpret: bool,
    normaliser: bool = False,
) -> Any:
    """The kernel's result, padding of queries included; with `normaliser` (result, log-sum-exp)."""
    # Imported here: Pallas takes half a second that no program for a CPU needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    N, S = q_BNTH.shape[1], k_BKSH.shape[2]
    segments = _segments(q_BNTH.shape[2], S, len(q_BNTH), mask)
    q_BNTH = _padded(q_BNTH, 2, LANES)
    k_BKSH, v_BKSH = (_padded(x, 2, LANES) for x in (k_BKSH, v_BKSH))
    shape = q_BNTH.shape[2], k_BKSH.shape[2]
    first = mask.first
    causal = isinstance(first, int)
    known = masks.CausalMask(shape, offset=first) if causal else masks.FullMask(shape)
    queries, keys = (_block(size) for size in shape)
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([known] * N),
        block_sizes=kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=normaliser,
        # Kept where remat "attention" keeps attention's results: the backward pass needs both.
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    if segments is None:
        found = jax.vmap(run)(q_BNTH, k_BKSH, v_BKSH)
    else:
        query_BT, key_BS = segments
        found = jax.vmap(lambda q, k, v, t, s: run(q, k, v, segment_ids=kernel.SegmentIds(t, s)))(
            q_BNTH, k_BKSH, v_BKSH, _padded(query_BT, 1, LANES), _padded(key_BS, 1, LANES)
        )
    if not normaliser:
        return found
    mixed_BNTH, (log_BNT,) = found
    return mixed_BNTH, log_BNT


def _segments(T: int, S: int, B: int, mask: Mask) -> tuple[Array, Array] | None:
    """(of queries [B, T], of keys [B, S]): ids from 1 on, 0 for what nobody may see; or None."""
    # What padding adds to the keys stands behind all queries, or there is none.
    hidden_anyway = (mask.first is not None and mask.first + T <= S) or S % LANES == 0
    if mask.valid_BS is None and mask.query_segments_BT is None and hidden_anyway:
        return None
    queries_BT, keys_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    if mask.query_segments_BT is not None:
        assert mask.key_segments_BS is not None
        queries_BT, keys_BS = mask.query_segments_BT + 1, mask.key_segments_BS + 1
    if mask.valid_BS is not None:
        keys_BS = jnp.where(mask.valid_BS, keys_BS, 0)
    return queries_BT, keys_BS


def _block(size: int) -> int:
    """The largest block, a multiple of LANES, that divides the padded length."""
    most = min(size, LARGEST_BLOCK)
    return next(b for b in range(most - most % LANES, 0, -LANES) if size % b == 0)


def _padded(x: Array, axis: int, multiple: int) -> Array:
    """Zeros behind an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
