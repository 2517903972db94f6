"""The projections of torch's MultiheadAttention as Linears, with torch's initialisers.

    x_E --into_heads--> q, k, v [N, H]
    mixed [N, H] --out_of_heads--> E

Dimensions: E width, N heads, H = E / N.
"""

import jax

from llava_mini_jax.ops.einsum import Linear
from llava_mini_jax.params import Initializer, ParamSpec, torch_linear, zeros


def into_heads(width: int, heads: int, init: Initializer | None = None) -> Linear:
    # torch draws its packed [3E, E] input projection by Xavier's rule.
    init = init or _uniform((6.0 / (4 * width)) ** 0.5)
    return Linear(
        kernel=ParamSpec((heads, width // heads, width), ("heads", None, "embed"), init),
        bias=ParamSpec((heads, width // heads), ("heads", None), zeros),
    )


def out_of_heads(width: int, heads: int, init: Initializer | None = None) -> Linear:
    init = init or torch_linear(width)
    return Linear(
        kernel=ParamSpec((width, heads, width // heads), ("embed", "heads", None), init),
        bias=ParamSpec((width,), ("norm",), zeros),
    )


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
