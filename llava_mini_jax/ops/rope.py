"""Rotary position embedding in Hugging Face's layout: the two halves of a head are the pairs.

    RopeConfig --frequencies--> radians a position of each pair --angles--> [B, T, H/2]
                                                                               |
                               queries or keys, RopeConfig.stretch --rotate--> turned, stretched

Published scalings are data: each has its own way to stretch the frequencies of longer texts.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.params import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (`rope_type: linear`)."""

    factor: float

    def stretched(self, freqs: np.ndarray, head_width: int, theta: float) -> np.ndarray:
        return freqs / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK scaling by the length of the text (`rope_type: dynamic`).

    It begins behind the model's `max_positions`; up to there frequencies are what they are without
    it, in transformers too, and no text is longer here. Kept, so that an export says it again.
    """

    factor: float

    def stretched(self, freqs: np.ndarray, head_width: int, theta: float) -> np.ndarray:
        return freqs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """LLaMA-3.1's stretching of low frequencies (`rope_type: llama3`).

    Wavelengths below original/high_freq_factor are left alone, frequencies of wavelengths above
    original/low_freq_factor divided by `factor`, those between interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretched(self, freqs: np.ndarray, head_width: int, theta: float) -> np.ndarray:
        turns = self.original_max_position_embeddings * freqs / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        # Clipped, one formula serves all three ranges: 0 divides, 1 leaves alone.
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * freqs / self.factor + smooth * freqs


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071; `rope_type: yarn`), as transformers computes it.

    Pairs that turn more than `beta_fast` times in the original length are left alone, those that
    turn less than `beta_slow` times divided by `factor`, and a ramp over the pairs lies between.
    `attention_factor` stretches queries and keys.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the ramp begins and ends at whole pairs
    attention_factor: float

    def stretched(self, freqs: np.ndarray, head_width: int, theta: float) -> np.ndarray:
        low, high = (
            self._pair(turns, head_width, theta) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_width - 1)
        # A ramp of no length would divide by 0.
        length = high - low or 0.001
        ramp = np.clip((np.arange(head_width // 2, dtype=np.float32) - low) / length, 0, 1)
        ramp = ramp.astype(np.float32)
        return freqs / np.float32(self.factor) * ramp + freqs * (1 - ramp)

    def _pair(self, turns: float, head_width: int, theta: float) -> float:
        """The pair, a fraction of one too, that turns so often in the original length."""
        per_turn = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_width * math.log(per_turn) / (2 * math.log(theta))


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    theta: float
    scaling: Scaling | None

    @property
    def stretch(self) -> float:
        """What rotated queries and keys are multiplied with."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


def frequencies(head_width: int, cfg: RopeConfig) -> np.ndarray:
    """Radians a position of each of the H/2 pairs, float32, on the host (a constant under jit)."""
    # Float32 at every step, as Hugging Face does it: by way of float64 last digits differ.
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    freqs = (1.0 / np.float32(cfg.theta) ** exponents).astype(np.float32)
    if cfg.scaling is None:
        return freqs
    return cfg.scaling.stretched(freqs, head_width, cfg.theta).astype(np.float32)


def angles(positions_BT: Array, head_width: int, cfg: RopeConfig) -> Array:
    """Angles [B, T, H/2] in float32."""
    # Not bfloat16, which tells whole numbers apart up to 256 only.
    return positions_BT[..., None].astype(jnp.float32) * frequencies(head_width, cfg)


def rotate(x_BTNH: Array, angles_BTH: Array, stretch: float | Array = 1.0) -> Array:
    """Queries or keys turned by their positions' angles, times `stretch` (`RopeConfig.stretch`)."""
    cos, sin = jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    if not isinstance(stretch, float) or stretch != 1.0:
        turned = turned * stretch
    return turned.astype(x_BTNH.dtype)
