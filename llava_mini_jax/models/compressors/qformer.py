"""InstructBLIP's Q-Former: queries read a question by self-attention and an image by another.

    queries + text embeddings --norm--> x --each layer--> the queries of the last one [I, Q, W]

    a layer:  [queries | text] self-attention, norm
              queries: every `cross_every`-th layer cross-attention to the image, norm; MLP, norm
              text:    an MLP of its own, norm

BERT with norms behind each sum, exact GELU and no masks but the text's padding. The last layer's
text MLP changes nothing that is read: it is kept so that a checkpoint is complete.

Dimensions: I images, each with its own question, Q queries, T ids, S = Q + T, P positions of the
image, W width, C of the image, N heads, H = W / N, M MLP width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.ops.einsum import Linear, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal, zeros

_MASKED = -10000.0  # what BERT adds to scores of padding; in float32 its share is exactly 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    width: int
    heads: int
    layers: int
    mlp_width: int
    cross_every: int  # layers 0, n, 2n, ... read the image
    cross_width: int  # of the image
    queries: int
    vocabulary: int
    positions: int
    norm_eps: float

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"Q-Former: width {self.width} is not divided by {self.heads} heads")


@struct.dataclass
class Attention:
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    norm: LayerNorm


@struct.dataclass
class Mlp:
    fc1: Linear
    fc2: Linear
    norm: LayerNorm


@struct.dataclass
class Layer:
    attention: Attention
    cross: Attention | None  # None in the layers between
    query_mlp: Mlp
    text_mlp: Mlp


@struct.dataclass
class QFormer:
    query: Leaf  # [1, Q, W], as it is published
    embed_tokens: Leaf
    position: Leaf
    norm: LayerNorm
    layers: tuple[Layer, ...]


def spec(cfg: QFormerConfig) -> QFormer:
    W, init = cfg.width, normal(0.02)
    layers = tuple(
        Layer(
            attention=_attention(cfg, W),
            cross=None if number % cfg.cross_every else _attention(cfg, cfg.cross_width),
            query_mlp=_mlp(cfg),
            text_mlp=_mlp(cfg),
        )
        for number in range(cfg.layers)
    )
    return QFormer(
        query=ParamSpec((1, cfg.queries, W), (None, None, "norm"), init),
        embed_tokens=ParamSpec((cfg.vocabulary, W), (None, "norm"), init),
        position=ParamSpec((cfg.positions, W), (None, "norm"), init),
        norm=layer_norm_spec(W),
        layers=layers,
    )


def _attention(cfg: QFormerConfig, inputs: int) -> Attention:
    W, N = cfg.width, cfg.heads

    def into(width: int) -> Linear:
        kernel = ParamSpec((N, W // N, width), ("heads", None, None), normal(0.02))
        return Linear(kernel=kernel, bias=ParamSpec((N, W // N), ("heads", None), zeros))

    out = ParamSpec((W, N, W // N), (None, "heads", None), normal(0.02))
    return Attention(
        q_proj=into(W),
        k_proj=into(inputs),
        v_proj=into(inputs),
        o_proj=Linear(kernel=out, bias=ParamSpec((W,), ("norm",), zeros)),
        norm=layer_norm_spec(W),
    )


def _mlp(cfg: QFormerConfig) -> Mlp:
    W, M = cfg.width, cfg.mlp_width
    return Mlp(
        fc1=Linear(
            kernel=ParamSpec((M, W), ("mlp", None), normal(0.02)),
            bias=ParamSpec((M,), ("mlp",), zeros),
        ),
        fc2=Linear(
            kernel=ParamSpec((W, M), (None, "mlp"), normal(0.02)),
            bias=ParamSpec((W,), ("norm",), zeros),
        ),
        norm=layer_norm_spec(W),
    )


def apply(params: QFormer, picture_IPC: Array, text_IT: Array, cfg: QFormerConfig) -> Array:
    """The queries [I, Q, W] behind the last layer; text is negative where it is padded.

    Raises ValueError for more text than there are positions.
    """
    I, T = text_IT.shape
    if cfg.positions < T:
        raise ValueError(
            f"a question of {T} ids is given to a Q-Former of {cfg.positions} positions: cut it"
            " on the left"
        )
    Q, dtype = cfg.queries, picture_IPC.dtype
    spec = sharding.partition((I, T, cfg.width), ("batch", None, None))
    text_ITW = params.embed_tokens.at[jnp.maximum(text_IT, 0)].get(out_sharding=spec)
    text_ITW = text_ITW + params.position[:T]
    # Made from the image, they lie on the mesh as it does; plain ones could not join it.
    query_IQW = jnp.zeros_like(picture_IPC[:, :1, :1]) + params.query
    x_ISW = jnp.concatenate([query_IQW.astype(dtype), text_ITW.astype(dtype)], axis=1)
    x_ISW = layer_norm(x_ISW, params.norm, cfg.norm_eps)
    padding_IS = jnp.pad(jnp.where(text_IT < 0, _MASKED, 0.0), ((0, 0), (Q, 0)))
    for layer in params.layers:
        x_ISW = _attend(layer.attention, x_ISW, x_ISW, padding_IS, cfg)
        query_IQW, text_ITW = x_ISW[:, :Q], x_ISW[:, Q:]
        if layer.cross is not None:
            query_IQW = _attend(layer.cross, query_IQW, picture_IPC, None, cfg)
        query_IQW = _feed(layer.query_mlp, query_IQW, cfg)
        text_ITW = _feed(layer.text_mlp, text_ITW, cfg)
        x_ISW = jnp.concatenate([query_IQW, text_ITW], axis=1)
    return x_ISW[:, :Q]


def _attend(
    params: Attention, x_ISW: Array, keys_IPC: Array, added_IP: Array | None, cfg: QFormerConfig
) -> Array:
    axes = ("batch", None, "heads", None)
    q_ISNH = linear("ISW,NHW->ISNH", x_ISW, params.q_proj, axes)
    k_IPNH, v_IPNH = (
        linear("IPC,NHC->IPNH", keys_IPC, p, axes) for p in (params.k_proj, params.v_proj)
    )
    scale = (cfg.width // cfg.heads) ** -0.5
    scores_INSP = jnp.einsum("ISNH,IPNH->INSP", q_ISNH * scale, k_IPNH).astype(jnp.float32)
    if added_IP is not None:
        scores_INSP += added_IP[:, None, None]
    weights_INSP = jax.nn.softmax(scores_INSP).astype(x_ISW.dtype)
    mixed_ISNH = jnp.einsum("INSP,IPNH->ISNH", weights_INSP, v_IPNH)
    y_ISW = linear("ISNH,WNH->ISW", mixed_ISNH, params.o_proj, ("batch", None, None))
    return layer_norm(x_ISW + y_ISW, params.norm, cfg.norm_eps)


def _feed(params: Mlp, x_ISW: Array, cfg: QFormerConfig) -> Array:
    y_ISM = linear("ISW,MW->ISM", x_ISW, params.fc1, ("batch", None, "mlp"))
    y_ISM = jax.nn.gelu(y_ISM, approximate=False)
    y_ISW = linear("ISM,WM->ISW", y_ISM, params.fc2, ("batch", None, None))
    return layer_norm(x_ISW + y_ISW, params.norm, cfg.norm_eps)
