"""Scans of handwritten digits, enlarged and bent into the glyphs that pages are made of.

    1,797 scans, 8 x 8 --last 1,437--> train ---.
                       '--first 360--> heldout -+--enlarge, bend--> glyphs [scan, variant, G, G]

The scans are the UCI "Optical Recognition of Handwritten Digits" test set, which scikit-learn
carries. They stand in the order of their writers, so the first 360 are by hands that training
hardly meets.
"""

import functools

import numpy as np

from llava_mini_jax.errors import InputError

HELD_OUT_SCANS = 360  # the first ones in file order; the other 1,437 are for training

_SCAN_SIZE = 8
_VARIANTS = 16  # tilted and scaled versions of a scan that augmentation chooses from


@functools.cache
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans of a split, float32 [N, 8, 8] in [0, 1] with 1 = ink, and their digits [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits world needs scikit-learn, which carries the scans; install it with: "
            "pip install 'llava-mini-jax[demo]'"
        ) from error
    levels, labels = load_digits(return_X_y=True)
    scans_NHW = (np.asarray(levels, np.float32) / 16).reshape(-1, _SCAN_SIZE, _SCAN_SIZE)
    part = slice(HELD_OUT_SCANS, None) if split == "train" else slice(HELD_OUT_SCANS)
    return scans_NHW[part], np.asarray(labels)[part]


@functools.lru_cache(maxsize=8)
def glyph_bank(split: str, size: int, augment: bool, seed: int) -> np.ndarray:
    """All scans of a split enlarged to `size` pixels: uint8 [N, variants, size, size], 255 = ink.

    With `augment` the variants of a scan differ in tilt, slant, width, scale, sub-pixel shift,
    thickness of the stroke and strength of ink: what writers differ in. Drawn once, because
    enlarging costs more than all the rest of a page.
    """
    scans_NHW, _ = load_scans(split)
    count, variants = len(scans_NHW), _VARIANTS if augment else 1
    rng = np.random.default_rng(seed)
    glyphs = np.empty((count, variants, size, size), np.uint8)
    for variant in range(variants):
        spread = rng.uniform(-1, 1, (8, count, 1)).astype(np.float32) * augment
        angle, scale, strength = 0.25 * spread[0], 0.92 + 0.12 * spread[1], 0.85 + 0.15 * spread[2]
        narrow, slant, thickness = 0.15 * spread[5], 0.25 * spread[6], np.exp(0.5 * spread[7])
        # Where each pixel of the glyph lies in the scan, in scan pixels.
        step = np.float32(_SCAN_SIZE / size) / scale
        axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
        y, x = (part.ravel() for part in np.meshgrid(axis, axis, indexing="ij"))
        y, x = y * (1 + narrow), x * (1 - narrow) + y * slant
        middle = (_SCAN_SIZE - 1) / 2
        rows = step * (np.cos(angle) * y + np.sin(angle) * x) + middle + 0.5 * spread[3]
        columns = step * (np.cos(angle) * x - np.sin(angle) * y) + middle + 0.5 * spread[4]
        inked = (_tent(rows) @ scans_NHW * _tent(columns)).sum(-1).clip(0, 1) ** thickness
        inked *= 255 * (strength if augment else 1)
        glyphs[:, variant] = inked.reshape(count, size, size).round()
    return glyphs


def _tent(places: np.ndarray) -> np.ndarray:
    """Weights of linear interpolation between scan pixels; outside the scan there is paper."""
    distance = np.abs(places[..., None] - np.arange(_SCAN_SIZE, dtype=np.float32))
    return np.maximum(0, 1 - distance)
