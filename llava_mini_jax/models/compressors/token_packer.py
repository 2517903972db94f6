"""TokenPacker: a coarse map's cells read four levels of the tower in their window (2407.02392).

    patches_IPE --bilinear, s times smaller--> one cell a window --norm--> queries ---------.
    levels 12, 16, 22, 23 on channels --MLP, norm--> keys, --MLP, norm--> values, s*s a window |
                                                            tokens_IQD <--MLP-- heads <-------'

It is the projector. Nothing is added to the attention's output, and no position is told (the
paper's "injection" has a residual in neither place of the code).

Dimensions: I images, Q = (side / s)^2 windows, W = s*s patches of a window, E width of the tower,
C = levels * E, N heads, H = E / N, M, D width of the LLM.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models.compressors.heads import into_heads, out_of_heads
from llava_mini_jax.models.compressors.signature import (
    INSTEAD,
    Compressed,
    CompressorConfig,
    Declaration,
    side_of,
)
from llava_mini_jax.models.compressors.windows import windows
from llava_mini_jax.models.seen import Reads, Seen
from llava_mini_jax.ops.einsum import Linear, einsum, linear
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPackerConfig(CompressorConfig):
    kind: str = "token_packer"
    width: int  # of the tower
    out_width: int  # of the language model
    heads: int
    levels: tuple[int, ...]  # of the tower's hidden states, whose patches are keys and values
    scale: int  # s: patches along one side of a window
    norm_eps: float

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"token_packer: width {self.width} is not divided by {self.heads} heads"
            )
        if self.scale < 1 or not self.levels:
            raise ValueError(
                f"token_packer: scale {self.scale} and levels {self.levels}; give a scale of 1 or"
                " more and at least one level"
            )


Config = TokenPackerConfig


@struct.dataclass
class Mlp:
    fc1: Linear
    fc2: Linear


@struct.dataclass
class TokenPacker:
    query_in: Leaf
    key_in: Mlp
    value_in: Mlp
    query_norm: LayerNorm
    key_norm: LayerNorm
    value_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    into_llm: Mlp


def declare(cfg: TokenPackerConfig) -> Declaration:
    return Declaration(
        places=(INSTEAD,), reads=Reads(levels=cfg.levels), widths=(cfg.width, cfg.out_width)
    )


def tokens(cfg: TokenPackerConfig, side: int) -> int:
    if side % cfg.scale:
        raise ValueError(
            f"token_packer: scale {cfg.scale} does not divide {side} x {side} patches; use one of "
            f"{', '.join(str(s) for s in range(1, side + 1) if side % s == 0)}"
        )
    return (side // cfg.scale) ** 2


def spec(cfg: TokenPackerConfig) -> TokenPacker:
    E, N, C, D = cfg.width, cfg.heads, len(cfg.levels) * cfg.width, cfg.out_width
    into = into_heads(E, N, normal(0.02))
    return TokenPacker(
        query_in=ParamSpec((E, E), ("embed", None), normal(0.02)),
        key_in=_mlp(C, E),
        value_in=_mlp(C, E),
        query_norm=layer_norm_spec(E),
        key_norm=layer_norm_spec(E),
        value_norm=layer_norm_spec(E),
        q_proj=into,
        k_proj=into,
        v_proj=into,
        o_proj=out_of_heads(E, N, normal(0.02)),
        into_llm=_mlp(E, D),
    )


def _mlp(inputs: int, outputs: int) -> Mlp:
    def layer(out: int, into: int, axes: tuple[str | None, str | None]) -> Linear:
        bias = ParamSpec((out,), ("mlp",) if axes[0] == "mlp" else ("norm",), zeros)
        return Linear(kernel=ParamSpec((out, into), axes, normal(0.02)), bias=bias)

    return Mlp(
        fc1=layer(outputs, inputs, ("mlp", None)), fc2=layer(outputs, outputs, ("embed", "mlp"))
    )


def _mix(x_IPC: Array, params: Mlp) -> Array:
    """Linear, exact GELU, linear."""
    x_IPM = linear("IPC,MC->IPM", x_IPC, params.fc1, ("batch", None, "mlp"))
    x_IPM = jax.nn.gelu(x_IPM, approximate=False)
    return linear("IPM,EM->IPE", x_IPM, params.fc2, ("batch", None, None))


def apply(params: TokenPacker, seen: Seen, cfg: TokenPackerConfig) -> Compressed:
    side = side_of(seen)
    tokens(cfg, side)
    levels_IPC = jnp.concatenate(seen.levels, axis=-1)
    coarse_IQE = pooled(seen.patches_IPE, side, cfg.scale)
    axes = ("batch", None, "heads", None)
    query_IQE = einsum("IQC,EC->IQE", coarse_IQE, params.query_in, ("batch", None, None))
    key_IPE, value_IPE = _mix(levels_IPC, params.key_in), _mix(levels_IPC, params.value_in)
    q_IQNH, k_IPNH, v_IPNH = (
        linear("IPE,NHE->IPNH", layer_norm(x, norm, cfg.norm_eps), p, axes)
        for x, norm, p in (
            (query_IQE, params.query_norm, params.q_proj),
            (key_IPE, params.key_norm, params.k_proj),
            (value_IPE, params.value_norm, params.v_proj),
        )
    )
    k_IQWNH, v_IQWNH = (windows(x, side, cfg.scale) for x in (k_IPNH, v_IPNH))
    scale = (cfg.width // cfg.heads) ** -0.5
    weights_IQNW = jax.nn.softmax(
        jnp.einsum("IQNH,IQWNH->IQNW", q_IQNH * scale, k_IQWNH).astype(jnp.float32)
    )
    mixed_IQNH = jnp.einsum("IQNW,IQWNH->IQNH", weights_IQNW.astype(v_IQWNH.dtype), v_IQWNH)
    mixed_IQE = linear("IQNH,ENH->IQE", mixed_IQNH, params.o_proj, ("batch", None, None))
    tokens_IQD = _mix(mixed_IQE, params.into_llm)
    return Compressed(tokens_IQD, attention_IQP=weights_IQNW.mean(axis=2))


def pooled(patches_IPE: Array, side: int, scale: int) -> Array:
    """The map made `scale` times smaller as torch's bilinear does it without antialiasing.

    A sample, not a mean: of a window of odd side the patch in its middle, of an even one the mean
    of the four about its middle.
    """
    first, last = (scale - 1) // 2, scale // 2
    cells_IQWE = windows(patches_IPE, side, scale)
    middle = [y * scale + x for y in sorted({first, last}) for x in sorted({first, last})]
    return jnp.stack([cells_IQWE[:, :, place] for place in middle]).mean(axis=0)
