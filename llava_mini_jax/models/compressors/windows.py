"""A square map's patches by the square windows that they lie in.

    [I, P, ...] --k x k patches a window--> [I, Q, W, ...]

Dimensions: I images, P = side * side patches, Q = (side / k)^2 windows, W = k * k patches of one.
"""

from llava_mini_jax.params import Array


def windows(x: Array, side: int, window: int) -> Array:
    """The patches of each window, row-major in both; `window` divides `side`."""
    grid, rest = side // window, x.shape[2:]
    # Axis by axis: an Explicit mesh allows only such reshapes.
    x = x.reshape(len(x), grid, window, side, *rest)
    x = x.reshape(len(x), grid, window, grid, window, *rest).swapaxes(2, 3)
    x = x.reshape(len(x), grid * grid, window, window, *rest)
    return x.reshape(len(x), grid * grid, window * window, *rest)
