"""The paper's compressor: C*C learned queries read the patches by similarity alone.

    patches_IPE --> keys (+ 2-D position), values (without position) --.
    query_QE (+ 2-D position) -----------------------------------------+--> tokens_IQE

One softmax(Q K^T) over the patches themselves (section 4.1, equation 2): no other parameters than
the queries; fixed sin-cos positions on queries and keys.

Dimensions: I images, P patches, Q = C*C queries, E width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.grid import declare as declare
from llava_mini_jax.models.compressors.grid import tokens as tokens
from llava_mini_jax.models.compressors.positions import sincos
from llava_mini_jax.models.compressors.signature import Compressed, side_of
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.einsum import einsum
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal

Config = GridConfig


@struct.dataclass
class SimilarityCompressor:
    query: Leaf


def spec(cfg: GridConfig) -> SimilarityCompressor:
    query = ParamSpec((cfg.grid**2, cfg.width), (None, "norm"), normal(0.02))
    return SimilarityCompressor(query=query)


def apply(params: SimilarityCompressor, seen: Seen, cfg: GridConfig) -> Compressed:
    dtype = seen.patches_IPE.dtype
    query_QE = params.query.astype(dtype) + sincos(cfg.grid, cfg.width).astype(dtype)
    return read(query_QE, seen.patches_IPE, side_of(seen))


def read(query_QE: Array, patches_IPE: Array, side: int) -> Compressed:
    """What queries, their positions added, read of maps of side * side patches."""
    dtype = patches_IPE.dtype
    keys_IPE = patches_IPE + sincos(side, patches_IPE.shape[-1]).astype(dtype)
    # Not divided by sqrt(E): equation 2 of the paper has no scale.
    scores_IQP = einsum("IPE,QE->IQP", keys_IPE, query_QE, ("batch", None, None))
    weights_IQP = jax.nn.softmax(scores_IQP.astype(jnp.float32)).astype(dtype)
    tokens_IQE = jnp.einsum("IQP,IPE->IQE", weights_IQP, patches_IPE)
    return Compressed(tokens_IQE, attention_IQP=weights_IQP)
