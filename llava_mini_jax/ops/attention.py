"""Softmax attention, grouped-query included: one function in front of three implementations.

    queries, keys, values, Mask --choose--> cudnn   CUDA, bfloat16 or float16         ops/cudnn.py
                                       '--> splash  TPU, from 128 queries on          ops/splash.py
                                       '--> xla     everything else; the reference    here

The kernels never write scores of queries by keys to memory; what is written here is float32
[B, N, T, S]: 40 % of a 7B training step's time on TPU, two thirds of its traffic on GPU
(docs/performance.md).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.ops import cudnn, splash
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import Array

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
PLATFORM = {"cudnn": "gpu", "splash": "tpu"}  # "splash" runs on a CPU too, interpreted: for tests
# Fewer queries than these XLA serves better: decoding reads each key once, and has no scores to
# speak of (on TPU 37 us against 212 for one query before 12,288 keys, by the compiler).
FEWEST_QUERIES = {"cudnn": 16, "splash": 128}

_QUERY = ("batch", None, "heads", None)
_KEY = ("batch", "heads", None, None)
_PARTS = {
    "first": (),
    "valid_BS": ("batch", None),
    "query_segments_BT": ("batch", None),
    "key_segments_BS": ("batch", None),
    "until_BS": ("batch", None),
}
_log = logging.getLogger(__name__)


def attention(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    mask: Mask,
    implementation: str = "auto",
) -> Array:
    """softmax(q k^T / sqrt(H)) v with softmax in float32; returns [B, T, N, H].

    Heads stand in front of slots in keys and values, as a cache holds them and every implementation
    reads them. N query heads share K key/value heads in groups of N/K. A query that may attend to
    nothing gets something finite that no one reads.

    Raises InputError for an implementation that this platform, head width, dtype or mask does not
    have.
    """
    heads, kv_heads = q_BTNH.shape[2], k_BKSH.shape[1]
    windowed, ending = mask.window is not None, mask.until_BS is not None
    run, opaque = _kernel(q_BTNH, implementation, windowed=windowed, ending=ending)
    # None: there is no mesh. P(None): there is one, and the axis stays whole on it.
    split_heads = sharding.partition((heads,), ("heads",)) not in (None, jax.P(None))
    if split_heads and sharding.partition((kv_heads,), ("heads",)) == jax.P(None):
        # Query heads are split over more devices than there are key heads: give each its own copy.
        k_BKSH, v_BKSH = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (k_BKSH, v_BKSH))
    parts = mask.arrays()

    def local(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, *given: Array) -> Array:
        own = dataclasses.replace(mask, **dict(zip(parts, given, strict=True)))
        return run(q_BTNH, k_BKSH, v_BKSH, own)

    axes = (_QUERY, _KEY, _KEY, *(_PARTS[name] for name in parts))
    arrays = (q_BTNH, k_BKSH, v_BKSH, *parts.values())
    return sharding.local(local, axes, _QUERY, *arrays, opaque=opaque)


def attend(mask: Mask, implementation: str) -> Callable[[Array, Array, Array], Array]:
    """`attention` of queries, keys and values under one mask: what a decoder layer is given."""
    return functools.partial(attention, mask=mask, implementation=implementation)


def attention_weights(q_BTNH: Array, k_BKSH: Array, mask_BTS: Array) -> Array:
    """What `attention` weighs values with, averaged over heads: float32 [B, T, S]."""
    B, T, N, _ = q_BTNH.shape
    K = k_BKSH.shape[1]
    # Head by head in two axes: on a mesh they cannot be made one again.
    return _weights(q_BTNH, k_BKSH, mask_BTS).reshape(B, K, N // K, T, -1).mean(axis=(1, 2))


def check_attention(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f'attention "{implementation}" is unknown; use one of {known}')


def choose(
    implementation: str,
    platform: str,
    dtype: jnp.dtype,
    head_width: int,
    *,
    windowed: bool = False,
    ending: bool = False,
) -> tuple[str, str]:
    """(implementation for many queries, why) on a platform ("cpu", "gpu" or "tpu").

    `windowed`: queries see a window of the keys only (`Mask.window`); `ending`: there are keys that
    only queries up to some slot see (`Mask.until_BS`).

    "auto" takes the platform's kernel, and falls back on "xla" where that refuses; one that is
    asked for by name is refused with an InputError.
    """
    check_attention(implementation)
    if implementation == "xla":
        return "xla", "asked for"
    if implementation == "auto":
        kernel = next((name for name, where in PLATFORM.items() if where == platform), None)
        if kernel is None:
            return "xla", f"no fused kernel on {platform}"
        refusal = _refusal(kernel, dtype, head_width, windowed, ending)
        return ("xla", refusal) if refusal else (kernel, f"{platform} has it")
    needed = PLATFORM[implementation]
    if platform != needed and (implementation, platform) != ("splash", "cpu"):
        raise InputError(
            f'attention "{implementation}" needs a {needed.upper()}, and this program is for'
            f' {platform.upper()}: use "auto", which chooses what is available'
        )
    refusal = _refusal(implementation, dtype, head_width, windowed, ending)
    if refusal:
        raise InputError(f'attention "{implementation}": {refusal}; use "auto" or "xla"')
    return implementation, "asked for"


def describe(
    implementation: str, dtype: jnp.dtype, head_width: int, *, windowed: bool = False
) -> str:
    """One line for people: "splash from 128 queries on, else xla (tpu has it)"."""
    platform = sharding.platform()
    name, why = choose(implementation, platform, dtype, head_width, windowed=windowed)
    fewest = f" from {FEWEST_QUERIES[name]} queries on, else xla" if name in FEWEST_QUERIES else ""
    return f"{name}{fewest} ({why})"


def _refusal(kernel: str, dtype: jnp.dtype, head_width: int, windowed: bool, ending: bool) -> str:
    """What a kernel has against a dtype, head width or mask, "" if nothing."""
    takes = {"cudnn": cudnn, "splash": splash}[kernel]
    if kernel == "cudnn" and (why := cudnn.missing()):
        return why
    if jnp.dtype(dtype).name not in takes.DTYPES:
        return f"it takes {' and '.join(takes.DTYPES)}, not {jnp.dtype(dtype).name}"
    if head_width % takes.WIDTH_STEP or head_width > takes.WIDEST:
        step, most = takes.WIDTH_STEP, takes.WIDEST
        return f"its heads are multiples of {step} wide up to {most}, not {head_width}"
    if windowed and not takes.WINDOWS:
        return "it has no sliding window, which this language model has"
    if ending:
        return "it has no keys that end to be seen, which this compressor has"
    return ""


def _kernel(
    q_BTNH: Array, implementation: str, *, windowed: bool, ending: bool
) -> tuple[Callable[..., Array], bool]:
    """(what computes it, whether that is opaque to `sharding.local`)."""
    platform, queries = sharding.platform(), q_BTNH.shape[1]
    width = q_BTNH.shape[3]
    name, why = choose(
        implementation, platform, q_BTNH.dtype, width, windowed=windowed, ending=ending
    )
    if name in FEWEST_QUERIES and queries >= FEWEST_QUERIES[name]:
        if name == "cudnn":
            return cudnn.attention, False
        return functools.partial(splash.attention, interpret=platform == "cpu"), True
    if name == "xla" and implementation == "auto" and platform in PLATFORM.values():
        _say_once(f"attention: XLA in place of {platform.upper()}'s fused kernel: {why}")
    return reference, False


@functools.cache
def _say_once(line: str) -> None:
    _log.warning(line)


def reference(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask: Mask) -> Array:
    """`attention` in plain products, which XLA compiles for every platform and dtype."""
    dense_BTS = mask.dense(q_BTNH.shape[1], k_BKSH.shape[2])
    return weigh(_weights(q_BTNH, k_BKSH, dense_BTS), v_BKSH, q_BTNH.shape)


def under(mask_BTS: Array) -> Callable[[Array, Array, Array], Array]:
    """`attend` for a mask that is an array: for analyses whose mask is made of nothing simpler."""

    def masked(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array) -> Array:
        return weigh(_weights(q_BTNH, k_BKSH, mask_BTS), v_BKSH, q_BTNH.shape)

    return masked


def weigh(weights_BKRS: Array, v_BKSH: Array, shape: tuple[int, ...]) -> Array:
    """Means of the values [B, T, N, H], weighed."""
    B, T, N, H = shape
    K = v_BKSH.shape[1]
    # Float32 ends here: the product with the values runs in the activations' dtype.
    mixed_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS.astype(v_BKSH.dtype), v_BKSH)
    # Query head k * G + g reads key head k, as Hugging Face's repeat_kv pairs them.
    return mixed_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _weights(q_BTNH: Array, k_BKSH: Array, mask_BTS: Array | None) -> Array:
    """The softmax in float32 [B, K, G * T, S]: a group's heads one after another."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G = N // K
    # The group folded into the rows: one plain batched product a key head, twice as fast on CPU as
    # an einsum with a group axis.
    rows_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    # Summed and left in float32: the softmax must not see scores rounded to bfloat16.
    scores_BKRS = jnp.einsum(
        "BKRH,BKSH->BKRS", rows_BKRH * H**-0.5, k_BKSH, preferred_element_type=jnp.float32
    )
    if mask_BTS is not None:
        scores_BKGTS = scores_BKRS.reshape(B, K, G, T, S)
        # Finite: over a row of nothing but -inf the softmax, and every gradient behind it, is NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
        scores_BKRS = scores_BKGTS.reshape(B, K, G * T, S)
    return jax.nn.softmax(scores_BKRS, axis=-1)
