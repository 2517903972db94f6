"""LLaMA-VID: an image as what the question asks of it, and what is left pooled (2311.17043).

    class token, patches --norm--> Q-Former <-- the question's ids
                                      '--project--> text queries
    patches --keys--> softmax(text queries . keys) --mean over queries--> context --> 1 token
    patches --pooled to content x content, projector--------------------> content^2 tokens

It contains the projector. Tokens belong to an image and a question together, so a follow-up
question needs new ones. A film's frames go one by one, each with the whole question.

Code against paper: with a CLIP tower the released code drops the class token in front of the
Q-Former; with EVA's, which all of its published models have, behind it (`class_token`).

Dimensions: I images, each with its own question, P patches, S = P + 1 with the class token, Q
queries, T ids, E width of the tower, W of the Q-Former, D of the LLM.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models import projector
from llava_mini_jax.models.compressors import qformer
from llava_mini_jax.models.compressors.qformer import QFormer, QFormerConfig
from llava_mini_jax.models.compressors.signature import (
    INSTEAD,
    Compressed,
    CompressorConfig,
    Declaration,
    side_of,
)
from llava_mini_jax.models.compressors.windows import windows
from llava_mini_jax.models.projector import Projector, ProjectorConfig
from llava_mini_jax.models.seen import Reads, Seen
from llava_mini_jax.ops.einsum import Linear, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, ParamSpec, torch_linear

MOST_IDS = 256  # of a question, in the authors' code
# InstructBLIP's Q-Former, with which all published models begin: BERT's sizes, for a wider image.
INSTRUCT_BLIP: dict[str, Any] = dict(
    qformer_width=768,
    qformer_heads=12,
    qformer_layers=12,
    qformer_mlp_width=3072,
    qformer_cross_every=2,
    qformer_cross_width=1408,
    qformer_queries=32,
    qformer_vocabulary=30523,
    qformer_positions=512,
    qformer_norm_eps=1e-12,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaVidConfig(CompressorConfig):
    kind: str = "llama_vid"
    width: int  # of the tower
    out_width: int  # of the language model
    content: int  # pooled tokens along one side: 1 is the "mean", side is every patch
    class_token: bool  # whether the Q-Former sees it too: of EVA's towers, not of CLIP's patches
    vision_norm_eps: float
    qformer_width: int  # published sizes: INSTRUCT_BLIP
    qformer_heads: int
    qformer_layers: int
    qformer_mlp_width: int
    qformer_cross_every: int
    qformer_cross_width: int  # of the image; a tower of another width is projected to it
    qformer_queries: int
    qformer_vocabulary: int
    qformer_positions: int
    qformer_norm_eps: float

    def __post_init__(self):
        if self.content < 1:
            raise ValueError(
                f"llama_vid has no {self.content} x {self.content} content tokens; give 1 or more"
            )

    @property
    def qformer(self) -> QFormerConfig:
        names = (field.name for field in dataclasses.fields(QFormerConfig))
        return QFormerConfig(**{name: getattr(self, f"qformer_{name}") for name in names})

    @property
    def projector(self) -> ProjectorConfig:
        return ProjectorConfig(kind="mlp2x_gelu", in_width=self.width, out_width=self.out_width)


Config = LlamaVidConfig


@struct.dataclass
class LlamaVid:
    picture_in: Linear | None  # only where the tower is not as wide as what the Q-Former reads
    picture_norm: LayerNorm
    qformer: QFormer
    query_out: Linear
    key_proj: Linear
    context_out: Linear
    projector: Projector


def declare(cfg: LlamaVidConfig) -> Declaration:
    return Declaration(
        places=(INSTEAD,),
        reads=Reads(class_token=cfg.class_token, question=True),
        videos=True,
        question=min(MOST_IDS, cfg.qformer_positions),
        question_vocabulary=cfg.qformer_vocabulary,
        widths=(cfg.width, cfg.out_width),
    )


def tokens(cfg: LlamaVidConfig, side: int) -> int:
    if side % cfg.content:
        raise ValueError(
            f"llama_vid has no {cfg.content} x {cfg.content} content tokens of {side} x {side}"
            f" patches; use one of {', '.join(str(n) for n in range(1, side + 1) if side % n == 0)}"
        )
    return 1 + cfg.content**2


def spec(cfg: LlamaVidConfig) -> LlamaVid:
    E, W, D, C = cfg.width, cfg.qformer_width, cfg.out_width, cfg.qformer_cross_width
    return LlamaVid(
        picture_in=None if E == C else _linear(E, C),
        picture_norm=layer_norm_spec(C),
        qformer=qformer.spec(cfg.qformer),
        query_out=_linear(W, E),
        key_proj=_linear(E, E),
        context_out=_linear(E, D),
        projector=projector.spec(cfg.projector),
    )


def _linear(inputs: int, outputs: int) -> Linear:
    init = torch_linear(inputs)
    return Linear(
        kernel=ParamSpec((outputs, inputs), ("embed", None), init),
        bias=ParamSpec((outputs,), ("norm",), init),
    )


def apply(params: LlamaVid, seen: Seen, cfg: LlamaVidConfig) -> Compressed:
    side = side_of(seen)
    tokens(cfg, side)
    if seen.question_IT is None:
        raise ValueError(
            'compressor "llama_vid" reads the question, and none is given: give its ids in the'
            " Q-Former's vocabulary (Inputs.question_BIT)"
        )
    weights_IQP = attention(params, text_queries(params, seen, cfg), seen.patches_IPE)
    # The mean over queries comes behind the softmax of each; values are the patches as they are.
    context_IE = jnp.einsum("IQP,IPE->IE", weights_IQP, seen.patches_IPE) / weights_IQP.shape[1]
    axes = ("batch", None, None)
    context_I1D = linear("IPE,DE->IPD", context_IE[:, None], params.context_out, axes)
    content_IQE = windows(seen.patches_IPE, side, side // cfg.content).mean(axis=2)
    content_IQD = projector.apply(params.projector, content_IQE)
    return Compressed(jnp.concatenate([context_I1D, content_IQD], axis=1))


def text_queries(params: LlamaVid, seen: Seen, cfg: LlamaVidConfig) -> Array:
    """What the question asks for [I, Q, E], in the width of the tower."""
    axes = ("batch", None, None)
    picture_ISE = seen.patches_IPE
    if cfg.class_token:
        picture_ISE = jnp.concatenate([seen.class_IE[:, None], picture_ISE], axis=1)
    if params.picture_in is not None:
        picture_ISE = linear("ISE,CE->ISC", picture_ISE, params.picture_in, axes)
    picture_ISE = layer_norm(picture_ISE, params.picture_norm, cfg.vision_norm_eps)
    query_IQW = qformer.apply(params.qformer, picture_ISE, seen.question_IT, cfg.qformer)
    return linear("IQW,EW->IQE", query_IQW, params.query_out, axes)


def attention(params: LlamaVid, query_IQE: Array, patches_IPE: Array) -> Array:
    """How much each query looks at each patch [I, Q, P]."""
    key_IPE = linear("IPC,EC->IPE", patches_IPE, params.key_proj, ("batch", None, None))
    scores_IQP = jnp.einsum("IQE,IPE->IQP", query_IQE, key_IPE).astype(jnp.float32)
    scale = math.sqrt(query_IQE.shape[-1])
    return jax.nn.softmax(scores_IQP / scale).astype(patches_IPE.dtype)
