"""MQT-LLaVA's query transformer: any first tokens of an ordered set (arXiv 2405.19315).

    positions_QE --resized to the patches' grid, norm--> keys -----.
    patches_IPE --norm--> values ----------------------------------+--heads--> o_proj --> into_llm
    query_QE + positions_QE, the first `count`, norm --> queries --'            tokens_IQD

It is the projector. Keys hold positions alone, so every token is a learnt fixed pooling of the
patches, the same for every image (in the paper's figure the queries look at the image). Queries
do not meet: m tokens are the first m of all.

Dimensions: I images, P patches, Q tokens, E width of the tower, N heads, H = E / N, D of the LLM.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models.compressors.heads import into_heads, out_of_heads
from llava_mini_jax.models.compressors.positions import resize_positions, sincos
from llava_mini_jax.models.compressors.signature import (
    INSTEAD,
    Choice,
    Compressed,
    CompressorConfig,
    Declaration,
    check_counts,
    side_of,
)
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.einsum import Linear, einsum, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqtConfig(CompressorConfig):
    kind: str = "mqt"
    width: int  # of the tower
    out_width: int  # of the language model
    heads: int
    queries: int  # a square number: 256 in the release
    count: int  # how many of them are tokens; the release draws it again for every batch
    norm_eps: float
    counts: tuple[int, ...] = ()  # those that a request may ask for; none: `count` alone

    def __post_init__(self):
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"mqt: width {self.width} is not divided by 4 and {self.heads} heads")
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(f"mqt: {self.queries} queries do not form a square grid")
        if not 1 <= self.count <= self.queries:
            raise ValueError(f"mqt has no {self.count} tokens; give 1 to {self.queries}")
        check_counts("mqt", self.counts, self.count, self.queries)

    @property
    def made(self) -> int:
        """Tokens that are computed of an image: a request takes the first ones."""
        return max((self.count, *self.counts))


Config = MqtConfig


@struct.dataclass
class Mqt:
    query: Leaf
    position: Leaf  # frozen; rounded to float16 in the release
    query_norm: LayerNorm
    key_norm: LayerNorm
    value_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    into_llm: Leaf  # [E, D]: input features first, as it is published


def declare(cfg: MqtConfig) -> Declaration:
    choice = Choice(cfg.made, tuple((n, 0) for n in cfg.counts)) if cfg.counts else None
    return Declaration(places=(INSTEAD,), widths=(cfg.width, cfg.out_width), choice=choice)


def tokens(cfg: MqtConfig, side: int) -> int:
    return cfg.count


def spec(cfg: MqtConfig) -> Mqt:
    E, N, Q, D = cfg.width, cfg.heads, cfg.queries, cfg.out_width
    table = sincos(math.isqrt(Q), E).astype("float16")
    return Mqt(
        query=ParamSpec((Q, E), (None, "norm"), normal(0.02)),
        position=ParamSpec((Q, E), (None, "norm"), lambda k, s, dtype: jnp.asarray(table, dtype)),
        query_norm=layer_norm_spec(E),
        key_norm=layer_norm_spec(E),
        value_norm=layer_norm_spec(E),
        q_proj=into_heads(E, N),
        k_proj=into_heads(E, N),
        v_proj=into_heads(E, N),
        o_proj=out_of_heads(E, N, normal(0.02)),
        into_llm=ParamSpec((E, D), (None, "embed"), normal(D**-0.5)),
    )


def apply(params: Mqt, seen: Seen, cfg: MqtConfig) -> Compressed:
    weights_NQP = attention(params, side_of(seen), cfg)
    dtype = seen.patches_IPE.dtype
    values_IPE = layer_norm(seen.patches_IPE, params.value_norm, cfg.norm_eps)
    axes = ("batch", None, "heads", None)
    v_IPNH = linear("IPE,NHE->IPNH", values_IPE, params.v_proj, axes)
    mixed_IQNH = jnp.einsum("NQP,IPNH->IQNH", weights_NQP.astype(dtype), v_IPNH)
    mixed_IQE = linear("IQNH,ENH->IQE", mixed_IQNH, params.o_proj, ("batch", None, None))
    tokens_IQD = einsum("IQE,ED->IQD", mixed_IQE, params.into_llm, ("batch", None, None))
    shape = (len(v_IPNH), *weights_NQP.shape[1:])
    return Compressed(
        tokens_IQD, attention_IQP=jnp.broadcast_to(weights_NQP.mean(axis=0)[None], shape)
    )


def attention(params: Mqt, side: int, cfg: MqtConfig) -> Array:
    """Each head's weights of the patches, float32: of any image, for they do not see it."""
    position_QE = jax.lax.stop_gradient(params.position.astype(jnp.float32))
    keys_PE = resize_positions(position_QE, math.isqrt(cfg.queries), side)
    # The resized table is stored in the weights' dtype before it is normed.
    keys_PE = keys_PE.astype(params.position.dtype).astype(jnp.float32)
    query_QE = params.query[: cfg.made].astype(jnp.float32) + position_QE[: cfg.made]
    q_QNH, k_PNH = (
        linear("QE,NHE->QNH", layer_norm(x, norm, cfg.norm_eps), p, (None, "heads", None))
        for x, norm, p in (
            (query_QE, params.query_norm, params.q_proj),
            (keys_PE, params.key_norm, params.k_proj),
        )
    )
    scale = (cfg.width // cfg.heads) ** -0.5
    return jax.nn.softmax(jnp.einsum("QNH,PNH->NQP", q_QNH * scale, k_PNH))
