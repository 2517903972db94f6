"""Projector: vision width to language width (LLaVA's `mlp2x_gelu`, or one linear layer).

    features_ISE --fc1--> GELU --fc2--> tokens_ISD

Dimensions: I images, S tokens of an image, E vision width, D language width.
"""

import dataclasses

import jax
from flax import struct

from llava_mini_jax.ops.einsum import Linear, linear
from llava_mini_jax.params import Array, ParamSpec, torch_linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    kind: str  # "mlp2x_gelu" or "linear"
    in_width: int
    out_width: int

    def __post_init__(self):
        if self.kind not in ("mlp2x_gelu", "linear"):
            raise ValueError(f'projector "{self.kind}" is unknown; use "mlp2x_gelu" or "linear"')


@struct.dataclass
class Projector:
    fc1: Linear
    fc2: Linear | None


def spec(cfg: ProjectorConfig) -> Projector:
    def fresh(into: int, out: int) -> Linear:
        init = torch_linear(into)
        return Linear(
            kernel=ParamSpec((out, into), (None, "embed"), init),
            bias=ParamSpec((out,), ("norm",), init),
        )

    D = cfg.out_width
    return Projector(
        fc1=fresh(cfg.in_width, D), fc2=fresh(D, D) if cfg.kind == "mlp2x_gelu" else None
    )


def apply(params: Projector, features_ISE: Array) -> Array:
    """Tokens [I, S, D] in the width of the language model; exact (erf) GELU."""
    with jax.named_scope("projector"):
        x_ISD = linear("ISE,DE->ISD", features_ISE, params.fc1, ("batch", None, None))
        if params.fc2 is None:
            return x_ISD
        x_ISD = jax.nn.gelu(x_ISD, approximate=False)
        return linear("ISE,DE->ISD", x_ISD, params.fc2, ("batch", None, None))
