"""Average pooling to C*C tokens, the paper's table 8: adaptive windows, no parameters.

patches_IPE --mean over each of C x C windows--> tokens_IQE
"""

import jax.numpy as jnp
import numpy as np

from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.grid import declare as declare
from llava_mini_jax.models.compressors.grid import tokens as tokens
from llava_mini_jax.models.compressors.signature import Compressed, side_of
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.einsum import einsum

Config = GridConfig


def spec(cfg: GridConfig) -> None:
    return None


def apply(params: None, seen: Seen, cfg: GridConfig) -> Compressed:
    patches_IPE = seen.patches_IPE
    weights_QP = jnp.asarray(pooling_weights(side_of(seen), cfg.grid), patches_IPE.dtype)
    return Compressed(einsum("IPE,QP->IQE", patches_IPE, weights_QP, ("batch", None, None)))


def pooling_weights(side: int, grid: int) -> np.ndarray:
    """[grid*grid, side*side] weights of adaptive average pooling."""
    along = np.zeros((grid, side), np.float32)
    for i in range(grid):
        # torch's windows, rounded outwards: they overlap where `grid` does not divide `side`.
        start, end = i * side // grid, -(-(i + 1) * side // grid)
        along[i, start:end] = 1.0 / (end - start)
    return np.einsum("ya,xb->yxab", along, along).reshape(grid * grid, side * side)
