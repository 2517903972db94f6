"""Positions of a square map: 2-D sin-cos tables, and tables resized to another side.

    sincos(4, width) --[16, width]-- resize_positions(4, 6) --> [36, width]

Dimensions: Q = grid * grid entries of a table, P = side * side patches, E width.
"""

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.params import Array


def sincos(grid: int, width: int) -> np.ndarray:
    """2-D sin-cos positions [grid*grid, width], row-major, as in MAE (He et al. 2021).

    The first half of the width encodes the column, the second half the row; each half is
    [sin, cos] with frequencies 10000^(-i / (width/4)).
    """
    quarter = width // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid, dtype=np.float64)[:, None] * omega
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(one[None, :, :], (grid, grid, 2 * quarter))
    rows = np.broadcast_to(one[:, None, :], (grid, grid, 2 * quarter))
    return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width).astype(np.float32)


def resize_positions(position_QE: Array, grid: int, side: int) -> Array:
    """A position table of grid*grid resized to side*side as torch's bicubic does, in float32.

    A matrix product: the weights depend on the two sizes only. torch interpolates with A = -0.75,
    half-pixel centres and clamped edges; `jax.image.resize` uses A = -0.5, so it does not match.
    """
    if grid == side:
        return position_QE
    along = _bicubic_weights(grid, side)
    # Bicubic in the plane is bicubic along rows times bicubic along columns.
    weights = np.einsum("ya,xb->yxab", along, along).reshape(side * side, grid * grid)
    return jnp.einsum("PQ,QE->PE", weights, position_QE.astype(jnp.float32))


def _bicubic_weights(source: int, target: int) -> np.ndarray:
    """[target, source] weights of torch's one-dimensional bicubic interpolation."""
    weights = np.zeros((target, source), np.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = int(np.floor(centre))
        for tap in range(first - 1, first + 3):
            weights[i, min(max(tap, 0), source - 1)] += _cubic(abs(centre - tap), a=-0.75)
    return weights.astype(np.float32)


def _cubic(distance: float, *, a: float) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
