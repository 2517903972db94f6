"""One decoder block: LLaMA's, and what its relatives have of their own, as data.

    x_BTD --norm--> q, k, v (+ bias, norm) --positions--> remember --> attends --o_proj--> + --.
                                                                                              |
                       + <--down_proj-- silu(gate) * up <--norm-- ----------------------------'

A field of the config says what a family has: biases on queries, keys and values (Qwen2), norms on
queries and keys (Qwen3), a window (Mistral), layers without rotary positions (SmolLM3). `each`
makes a stack of weights one of layers that know whether they have positions.

Dimensions: as in models/llama.py.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct

from llava_mini_jax.ops.einsum import einsum
from llava_mini_jax.ops.layers import attention_name
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.ops.rope import RopeConfig, rotate
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal, ones, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    tied_head: bool  # the head is the embedding table
    qkv_bias: bool  # queries, keys and values have biases
    qk_norm: bool  # an RMS norm of each head's queries and keys, in front of their rotation
    window: int | None  # positions that a position attends to, itself included; None: all
    nope_layers: tuple[int, ...]  # numbers of the layers without rotary positions ("NoPE")
    init_stddev: float

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads are not a multiple of {self.kv_heads} key/value heads"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} positions; it must be 1 or more")


@struct.dataclass
class Block:
    attn_norm: Leaf
    q_proj: Leaf
    k_proj: Leaf
    v_proj: Leaf
    o_proj: Leaf
    mlp_norm: Leaf
    gate_proj: Leaf
    up_proj: Leaf
    down_proj: Leaf
    # None in families that lack them.
    q_bias: Leaf = None
    k_bias: Leaf = None
    v_bias: Leaf = None
    q_norm: Leaf = None
    k_norm: Leaf = None


@struct.dataclass
class Layer:
    """A block's weights, and what sets it apart from the other blocks of its stack."""

    weights: Block
    rotary: Leaf  # float32: 1, or 0 without rotary positions; None where all layers are alike


def block_spec(cfg: LlamaConfig) -> Block:
    D, N, K, H, M = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_width, cfg.mlp_width
    init = normal(cfg.init_stddev)
    # K may be less than the tensor axis has devices: then these stay whole (sharding.partition).
    into_kv = ParamSpec((K, H, D), ("heads", None, "embed"), init)
    bias = partial(ParamSpec, axes=("heads", None), init=zeros)
    own = {}
    if cfg.qkv_bias:
        own = dict(q_bias=bias((N, H)), k_bias=bias((K, H)), v_bias=bias((K, H)))
    if cfg.qk_norm:
        own |= dict.fromkeys(("q_norm", "k_norm"), ParamSpec((H,), ("norm",), ones))
    return Block(
        attn_norm=ParamSpec((D,), ("norm",), ones),
        q_proj=ParamSpec((N, H, D), ("heads", None, "embed"), init),
        k_proj=into_kv,
        v_proj=into_kv,
        o_proj=ParamSpec((D, N, H), ("embed", "heads", None), init),
        mlp_norm=ParamSpec((D,), ("norm",), ones),
        gate_proj=ParamSpec((M, D), ("mlp", "embed"), init),
        up_proj=ParamSpec((M, D), ("mlp", "embed"), init),
        down_proj=ParamSpec((D, M), ("embed", "mlp"), init),
        **own,
    )


def each(layers: Block | tuple, cfg: LlamaConfig, *, whole: bool = True) -> Any:
    """A stack as `fold_layers` and `block` take it: of `Layer`s, stacked or in a tuple.

    `whole`: these are all layers of the language model; else its first ones, or others that are
    built like these (pre-fusion's). Raises ValueError where a whole one has another depth, since
    the layers of a part cannot be told from their places in it.
    """
    unrolled = isinstance(layers, tuple)
    if not cfg.nope_layers:
        return tuple(Layer(one, None) for one in layers) if unrolled else Layer(layers, None)
    depth = len(layers) if unrolled else layers.attn_norm.shape[0]
    if whole and depth != cfg.layers:
        raise ValueError(
            f"{depth} of {cfg.layers} layers run by themselves (inside_layers), but layers"
            f" {cfg.nope_layers} have no rotary positions: use a language model whose layers"
            " are equal, or pre-fusion before it"
        )
    rotary_L = np.array([layer not in cfg.nope_layers for layer in range(depth)], np.float32)
    if unrolled:
        return tuple(map(Layer, layers, rotary_L))
    return Layer(layers, rotary_L)


def _only_these(k_BKTH: Array, v_BKTH: Array) -> tuple[Array, Array, None]:
    return k_BKTH, v_BKTH, None


def block(
    layer: Layer,
    x_BTD: Array,
    angles_BTH: Array,
    attends: Callable[[Array, Array, Array], Array],
    cfg: LlamaConfig,
    remember: Callable = _only_these,
    observe: Callable | None = None,
) -> tuple[Array, Any]:
    """One decoder layer over T positions; returns (x, memory).

    `remember(k, v)` puts the new keys and values [B, K, T, H] to the earlier ones and returns all
    [B, K, S, H] to attend to, and whatever the caller wants to keep; `attends` lets queries
    [B, T, N, H] attend to them (ops/attention.py). With `observe(queries, keys)` the memory is a
    pair of that and of what it returns: a layer's output for analyses, which changes nothing.
    """
    own = layer.weights
    y_BTD = rms_norm(x_BTD, own.attn_norm, cfg.norm_eps)
    q_BTNH = _project("BTD,NHD->BTNH", y_BTD, own.q_proj, own.q_bias)
    q_BTNH = attention_name(_placed(layer, q_BTNH, own.q_norm, angles_BTH, cfg))
    k_BKSH, v_BKSH, memory = remember(*_keys_values(layer, y_BTD, angles_BTH, cfg))
    if observe is not None:
        memory = memory, observe(q_BTNH, k_BKSH)
    mixed_BTNH = attention_name(attends(q_BTNH, k_BKSH, v_BKSH))
    x_BTD = x_BTD + einsum("BTNH,DNH->BTD", mixed_BTNH, own.o_proj, ("batch", None, None))
    y_BTD = rms_norm(x_BTD, own.mlp_norm, cfg.norm_eps)
    gate_BTM = einsum("BTD,MD->BTM", y_BTD, own.gate_proj, ("batch", None, "mlp"))
    up_BTM = einsum("BTD,MD->BTM", y_BTD, own.up_proj, ("batch", None, "mlp"))
    y_BTM = jax.nn.silu(gate_BTM) * up_BTM
    return x_BTD + einsum("BTM,DM->BTD", y_BTM, own.down_proj, ("batch", None, None)), memory


def keys_values(
    layer: Layer, x_BTD: Array, angles_BTH: Array, cfg: LlamaConfig
) -> tuple[Array, Array]:
    """A layer's keys and values only: all that positions whose output is not read must give."""
    y_BTD = rms_norm(x_BTD, layer.weights.attn_norm, cfg.norm_eps)
    return _keys_values(layer, y_BTD, angles_BTH, cfg)


def _keys_values(
    layer: Layer, y_BTD: Array, angles_BTH: Array, cfg: LlamaConfig
) -> tuple[Array, Array]:
    own = layer.weights
    k_BTKH = _project("BTD,KHD->BTKH", y_BTD, own.k_proj, own.k_bias)
    k_BTKH = _placed(layer, k_BTKH, own.k_norm, angles_BTH, cfg)
    v_BTKH = _project("BTD,KHD->BTKH", y_BTD, own.v_proj, own.v_bias)
    return attention_name(k_BTKH.swapaxes(1, 2)), attention_name(v_BTKH.swapaxes(1, 2))


def _project(equation: str, y_BTD: Array, kernel: Leaf, bias_NH: Leaf) -> Array:
    heads_BTNH = einsum(equation, y_BTD, kernel, ("batch", None, "heads", None))
    return heads_BTNH if bias_NH is None else heads_BTNH + bias_NH.astype(heads_BTNH.dtype)


def _placed(
    layer: Layer, x_BTNH: Array, norm_H: Leaf, angles_BTH: Array, cfg: LlamaConfig
) -> Array:
    """Queries or keys, normed where the family does, and turned by their positions."""
    if norm_H is not None:
        x_BTNH = rms_norm(x_BTNH, norm_H, cfg.norm_eps)
    if layer.rotary is None:
        return rotate(x_BTNH, angles_BTH, cfg.rope.stretch)
    # Turned by 0 it stays as it is, to the last bit; and what is not turned is not stretched.
    stretch = 1.0
    if cfg.rope.stretch != 1.0:
        stretch = 1.0 + layer.rotary * (cfg.rope.stretch - 1.0)
    return rotate(x_BTNH, angles_BTH * layer.rotary, stretch)
