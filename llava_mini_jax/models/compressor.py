"""Compressor: C*C learned queries read all patches of an image by cross-attention.

    patches_IPE --> keys (+ 2-D position), values (without position)
    query_QE (+ 2-D position) --> queries                                --> tokens_IQE

Two forms (paper section 4.1, equation 2; docs/release.md, "Compressor"):

- "similarity", the paper's: one softmax(Q K^T) over the patches themselves, no other parameters
  than the queries; fixed sin-cos positions on queries and keys.
- "multi_head", the release's: LayerNorms, an 8-head attention with biases and output projection,
  and a stored (trained) position table that is resized bicubically to the grid of the patches.

Two more reductions stand beside them, both without parameters: "average_pool" and "none" (every
patch is a token, as in LLaVA-1.5).

Dimensions: I images, P patches, Q = C*C queries, E width, N heads, H = E / N.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax.ops.einsum import Linear, einsum, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, Initializer, Leaf, ParamSpec, normal, torch_linear, zeros

KINDS = ("none", "average_pool", "similarity", "multi_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorConfig:
    kind: str
    width: int
    heads: int
    grid: int  # C: an image becomes C*C tokens
    norm_eps: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'compressor "{self.kind}" is unknown; use one of {", ".join(KINDS)}')
        if self.grid < 1:
            raise ValueError(f"grid is {self.grid}; give 1 or more: its square is the tokens")
        # Positions are sines and cosines of rows and of columns: a quarter of the width each.
        if self.kind in ("similarity", "multi_head") and self.width % 4:
            raise ValueError(f"compressor width {self.width} is not a multiple of 4")
        if self.kind == "multi_head" and (self.heads < 1 or self.width % self.heads):
            raise ValueError(f"compressor width {self.width} is not divided by {self.heads} heads")


@struct.dataclass
class SimilarityCompressor:
    query: Leaf


@struct.dataclass
class MultiHeadCompressor:
    query: Leaf
    position: Leaf
    query_norm: LayerNorm
    patch_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear


Compressor = SimilarityCompressor | MultiHeadCompressor | None


def spec(cfg: CompressorConfig) -> Compressor:
    E, N, Q = cfg.width, cfg.heads, cfg.grid**2
    query = ParamSpec((Q, E), (None, "norm"), normal(0.02))
    if cfg.kind == "similarity":
        return SimilarityCompressor(query=query)
    if cfg.kind != "multi_head":
        return None
    H = E // N
    # torch's MultiheadAttention draws its packed [3E, E] input projection by Xavier's rule.
    into_heads = Linear(
        kernel=ParamSpec((N, H, E), ("heads", None, "embed"), _uniform((6.0 / (4 * E)) ** 0.5)),
        bias=ParamSpec((N, H), ("heads", None), zeros),
    )
    return MultiHeadCompressor(
        query=query,
        position=ParamSpec(
            (Q, E),
            (None, "norm"),
            lambda key, shape, dtype: jnp.asarray(sincos(cfg.grid, E), dtype),
        ),
        query_norm=layer_norm_spec(E),
        patch_norm=layer_norm_spec(E),
        q_proj=into_heads,
        k_proj=into_heads,
        v_proj=into_heads,
        o_proj=Linear(
            kernel=ParamSpec((E, N, H), ("embed", "heads", None), torch_linear(E)),
            bias=ParamSpec((E,), ("norm",), zeros),
        ),
    )


def apply(
    params: Compressor, patches_IPE: Array, cfg: CompressorConfig
) -> tuple[Array, Array | None]:
    """(tokens [I, Q, E], attention [I, Q, P] averaged over heads) for a square grid of patches.

    The attention is None where there is none (pooling, no reduction).
    """
    side = round(patches_IPE.shape[1] ** 0.5)
    if side * side != patches_IPE.shape[1]:
        raise ValueError(f"{patches_IPE.shape[1]} patches are no square grid")
    with jax.named_scope("compressor"):
        if isinstance(params, MultiHeadCompressor):
            return _multi_head(params, patches_IPE, cfg, side)
        if isinstance(params, SimilarityCompressor):
            return _similarity(params, patches_IPE, cfg, side)
        if cfg.kind == "none":
            return patches_IPE, None
        weights_QP = jnp.asarray(pooling_weights(side, cfg.grid), patches_IPE.dtype)
        return einsum("IPE,QP->IQE", patches_IPE, weights_QP, ("batch", None, None)), None


def _similarity(
    params: SimilarityCompressor, patches_IPE: Array, cfg: CompressorConfig, side: int
) -> tuple[Array, Array]:
    dtype = patches_IPE.dtype
    query_QE = params.query.astype(dtype) + sincos(cfg.grid, cfg.width).astype(dtype)
    keys_IPE = patches_IPE + sincos(side, cfg.width).astype(dtype)
    # Not divided by sqrt(E): equation 2 of the paper has no scale.
    scores_IQP = einsum("IPE,QE->IQP", keys_IPE, query_QE, ("batch", None, None))
    weights_IQP = jax.nn.softmax(scores_IQP.astype(jnp.float32)).astype(dtype)
    return jnp.einsum("IQP,IPE->IQE", weights_IQP, patches_IPE), weights_IQP


def _multi_head(
    params: MultiHeadCompressor, patches_IPE: Array, cfg: CompressorConfig, side: int
) -> tuple[Array, Array]:
    dtype = patches_IPE.dtype
    values_IPE = layer_norm(patches_IPE, params.patch_norm, cfg.norm_eps)
    keys_IPE = values_IPE + resize_positions(params.position, cfg.grid, side).astype(dtype)
    query_QE = layer_norm(params.query.astype(dtype), params.query_norm, cfg.norm_eps)
    # Behind the norm, as in the release; the keys' positions too.
    query_QE = query_QE + params.position.astype(dtype)

    # No image axis: the queries are the same for every image.
    q_QNH = linear("QE,NHE->QNH", query_QE, params.q_proj, (None, "heads", None))
    k_IPNH, v_IPNH = (
        linear("IPE,NHE->IPNH", x, p, ("batch", None, "heads", None))
        for x, p in ((keys_IPE, params.k_proj), (values_IPE, params.v_proj))
    )
    scale = (cfg.width // cfg.heads) ** -0.5
    weights_INQP = jax.nn.softmax(
        jnp.einsum("QNH,IPNH->INQP", q_QNH * scale, k_IPNH).astype(jnp.float32)
    ).astype(dtype)
    mixed_IQNH = jnp.einsum("INQP,IPNH->IQNH", weights_INQP, v_IPNH)
    tokens_IQE = linear("IQNH,ENH->IQE", mixed_IQNH, params.o_proj, ("batch", None, None))
    return tokens_IQE, weights_INQP.mean(axis=1)


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


def pooling_weights(side: int, grid: int) -> np.ndarray:
    """[grid*grid, side*side] weights of adaptive average pooling."""
    along = np.zeros((grid, side), np.float32)
    for i in range(grid):
        # torch's windows, rounded outwards: they overlap where `grid` does not divide `side`.
        start, end = i * side // grid, -(-(i + 1) * side // grid)
        along[i, start:end] = 1.0 / (end - start)
    return np.einsum("ya,xb->yxab", along, along).reshape(grid * grid, side * side)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
