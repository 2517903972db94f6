"""The release's compressor: C*C learned queries read the patches by 8-head attention.

    patches_IPE --norm--> values; + position table, resized to the patches' grid --> keys --.
    query_QE --norm--> + position table ----------------------------------------------------+-->

LayerNorms, biases, an output projection and a stored (trained) position table (docs/release.md,
"Compressor").

Dimensions: I images, P patches, Q = C*C queries, E width, N heads, H = E / N.
"""

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.grid import declare as declare
from llava_mini_jax.models.compressors.grid import tokens as tokens
from llava_mini_jax.models.compressors.heads import into_heads, out_of_heads
from llava_mini_jax.models.compressors.positions import resize_positions, sincos
from llava_mini_jax.models.compressors.signature import Compressed, side_of
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.einsum import Linear, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Leaf, ParamSpec, normal

Config = GridConfig


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


def spec(cfg: GridConfig) -> MultiHeadCompressor:
    E, N, Q = cfg.width, cfg.heads, cfg.grid**2
    return MultiHeadCompressor(
        query=ParamSpec((Q, E), (None, "norm"), normal(0.02)),
        position=ParamSpec(
            (Q, E),
            (None, "norm"),
            lambda key, shape, dtype: jnp.asarray(sincos(cfg.grid, E), dtype),
        ),
        query_norm=layer_norm_spec(E),
        patch_norm=layer_norm_spec(E),
        q_proj=into_heads(E, N),
        k_proj=into_heads(E, N),
        v_proj=into_heads(E, N),
        o_proj=out_of_heads(E, N),
    )


def apply(params: MultiHeadCompressor, seen: Seen, cfg: GridConfig) -> Compressed:
    patches_IPE, dtype = seen.patches_IPE, seen.patches_IPE.dtype
    values_IPE = layer_norm(patches_IPE, params.patch_norm, cfg.norm_eps)
    position_PE = resize_positions(params.position, cfg.grid, side_of(seen))
    keys_IPE = values_IPE + position_PE.astype(dtype)
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
    return Compressed(tokens_IQE, attention_IQP=weights_INQP.mean(axis=1))
