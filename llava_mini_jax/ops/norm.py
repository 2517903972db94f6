"""Normalisation over the last axis, computed in float32 whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.params import Array, Leaf, ParamSpec, ones, zeros


@struct.dataclass
class LayerNorm:
    scale: Leaf
    bias: Leaf


def layer_norm_spec(width: int) -> LayerNorm:
    return LayerNorm(
        scale=ParamSpec((width,), ("norm",), ones), bias=ParamSpec((width,), ("norm",), zeros)
    )


def layer_norm(x: Array, params: LayerNorm, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps)
    return (y * params.scale.astype(jnp.float32) + params.bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    # Hugging Face rounds to x's dtype before it scales; here both are float32, rounded once.
    return (y * scale.astype(jnp.float32)).astype(x.dtype)
