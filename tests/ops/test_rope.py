"""Rotary positions: frequencies against transformers' numbers, rotation against complex ones."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.config import LLAMA_3_1_8B
from llava_mini_jax.ops import rope
from llava_mini_jax.ops.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)

# float32 powers and the order of products differ in the last bits between the libraries.
FREQUENCY_RTOL = 1e-6
# One rotation is a product and a sum of values of order 1 in float32.
ROTATION_ATOL = 1e-5

# transformers 5.23's _compute_llama3_parameters on torch 2.13 for LLaMA-3.1-8B (head width 128):
# unchanged up to pair 28, interpolated from 29 to 34, divided by 8 from 35 on.
TRANSFORMERS_LLAMA_3_1 = {
    0: 1.0,
    1: 0.8146172165870667,
    16: 0.03760603070259094,
    28: 0.0032114461064338684,
    29: 0.0021665706299245358,
    30: 0.0013718936825171113,
    32: 0.0005248460220173001,
    34: 0.0001785077911335975,
    35: 9.556212171446532e-05,
    40: 3.428102354519069e-05,
    63: 3.068925877869333e-07,
}


def formula(head_width: int, cfg: RopeConfig) -> list[float]:
    """The published rule, one frequency after another."""
    frequencies = []
    for pair in range(head_width // 2):
        frequency = cfg.theta ** (-2 * pair / head_width)
        if isinstance(cfg.scaling, LinearScaling):
            frequency /= cfg.scaling.factor
        elif isinstance(cfg.scaling, YarnScaling):
            frequency *= yarn(pair, head_width, cfg)
        elif isinstance(cfg.scaling, Llama3Scaling):
            s, wavelength = cfg.scaling, 2 * math.pi / frequency
            longest = s.original_max_position_embeddings / s.low_freq_factor
            shortest = s.original_max_position_embeddings / s.high_freq_factor
            if wavelength > longest:
                frequency /= s.factor
            elif wavelength >= shortest:
                turns = s.original_max_position_embeddings / wavelength
                kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                frequency = (1 - kept) * frequency / s.factor + kept * frequency
        frequencies.append(frequency)
    return frequencies


def yarn(pair: int, head_width: int, cfg: RopeConfig) -> float:
    """What YaRN multiplies a pair's frequency with."""
    s = cfg.scaling
    assert isinstance(s, YarnScaling)

    def whose(turns: float) -> float:
        """The pair that turns so often in the original length."""
        longest = s.original_max_position_embeddings / (2 * math.pi * turns)
        return head_width / 2 * math.log(longest, cfg.theta)

    low, high = whose(s.beta_fast), whose(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    kept = 1 - min(max((pair - low) / (high - low), 0), 1)
    return kept + (1 - kept) / s.factor


YARN = YarnScaling(
    factor=4.0,
    original_max_position_embeddings=32768,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=True,
    attention_factor=1.1,
)


def test_llama_3_1_frequencies_are_those_of_transformers() -> None:
    ours = rope.frequencies(LLAMA_3_1_8B.head_width, LLAMA_3_1_8B.rope)
    assert ours.dtype == np.float32 and ours.shape == (64,)
    for pair, theirs in TRANSFORMERS_LLAMA_3_1.items():
        assert ours[pair] == pytest.approx(theirs, rel=FREQUENCY_RTOL)


@pytest.mark.parametrize("head_width", [8, 64, 128])
@pytest.mark.parametrize(
    "cfg",
    [
        RopeConfig(theta=10000.0, scaling=None),
        LLAMA_3_1_8B.rope,
        RopeConfig(
            theta=500.0,
            scaling=Llama3Scaling(
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        RopeConfig(theta=10000.0, scaling=LinearScaling(factor=4.0)),
        RopeConfig(theta=10000.0, scaling=DynamicScaling(factor=4.0)),
        RopeConfig(theta=1e6, scaling=YARN),
        RopeConfig(theta=1e6, scaling=dataclasses.replace(YARN, truncate=False)),
    ],
    ids=["plain", "llama3", "llama3, other numbers", "linear", "dynamic", "yarn", "yarn, broken"],
)
def test_frequencies_follow_the_formula(head_width: int, cfg: RopeConfig) -> None:
    np.testing.assert_allclose(
        rope.frequencies(head_width, cfg), formula(head_width, cfg), rtol=FREQUENCY_RTOL
    )


def test_rotation_turns_pairs_of_the_two_halves() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [1, 1, 7, 20, 31]])
    cfg = RopeConfig(theta=100.0, scaling=None)
    ours = rope.rotate(jnp.asarray(x), rope.angles(positions, 8, cfg))
    as_complex = x[..., :4] + 1j * x[..., 4:]
    turned = as_complex * np.exp(1j * positions[..., None, None] * np.array(formula(8, cfg)))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ours, expected, atol=ROTATION_ATOL)


def test_angles_are_float32_and_rotation_keeps_the_dtype() -> None:
    cfg = RopeConfig(theta=10000.0, scaling=None)
    angles = rope.angles(jnp.array([[100_000]]), 8, cfg)
    assert angles.dtype == jnp.float32
    assert rope.rotate(jnp.ones((1, 1, 2, 8), jnp.bfloat16), angles).dtype == jnp.bfloat16


def test_a_stretch_multiplies_what_was_turned() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 8)), jnp.float32)
    angles = rope.angles(jnp.arange(3)[None], 8, RopeConfig(theta=100.0, scaling=None))
    np.testing.assert_array_equal(
        rope.rotate(x, angles, 1.25), rope.rotate(x, angles) * jnp.float32(1.25)
    )
    np.testing.assert_array_equal(rope.rotate(x, 0 * angles), x)
