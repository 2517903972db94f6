"""Rotary position embedding in Hugging Face's layout: the two halves of a head are the pairs."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.params import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """LLaMA-3.1's stretching of low frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    theta: float
    scaling: Llama3Scaling | None


def frequencies(head_width: int, cfg: RopeConfig) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, float32, on the host (a constant under jit).

    LLaMA-3.1 leaves wavelengths below original/high_freq_factor alone, divides frequencies of
    wavelengths above original/low_freq_factor by `factor`, and interpolates between.
    """
    # Float32 at every step, as Hugging Face does it: by way of float64 last digits differ.
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    freqs = (1.0 / np.float32(cfg.theta) ** exponents).astype(np.float32)
    if cfg.scaling is None:
        return freqs
    s = cfg.scaling
    turns = s.original_max_position_embeddings * freqs / (2 * math.pi)
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    # Clipped, one formula serves all three ranges: 0 divides, 1 leaves alone.
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * freqs / s.factor + smooth * freqs).astype(np.float32)


def angles(positions_BT: Array, head_width: int, cfg: RopeConfig) -> Array:
    """Angles [B, T, H/2] in float32."""
    # Not bfloat16, which tells whole numbers apart up to 256 only.
    return positions_BT[..., None].astype(jnp.float32) * frequencies(head_width, cfg)


def rotate(x_BTNH: Array, angles_BTH: Array) -> Array:
    """Queries or keys turned by their positions' angles."""
    cos, sin = jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
