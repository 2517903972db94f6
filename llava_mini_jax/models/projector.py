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
    E, D = cfg.in_width, cfg.out_width
    into, out = torch_linear(E), torch_linear(D)
    if cfg.kind == "linear":
        only = ParamSpec((D, E), ("embed", None), into)
        return Projector(fc1=Linear(only, ParamSpec((D,), ("norm",), into)), fc2=None)
    return Projector(
        fc1=Linear(ParamSpec((D, E), ("mlp", "embed"), into), ParamSpec((D,), ("mlp",), into)),
        fc2=Linear(ParamSpec((D, D), ("embed", "mlp"), out), ParamSpec((D,), ("norm",), out)),
    )


def apply(params: Projector, features_ISE: Array) -> Array:
    """Tokens [I, S, D] in the width of the language model; exact (erf) GELU."""
    with jax.named_scope("projector"):
        if params.fc2 is None:
            return linear("ISE,DE->ISD", features_ISE, params.fc1, ("batch", None, None))
        x_ISD = linear("ISE,DE->ISD", features_ISE, params.fc1, ("batch", None, "mlp"))
        x_ISD = jax.nn.gelu(x_ISD, approximate=False)
        return linear("ISE,DE->ISD", x_ISD, params.fc2, ("batch", None, None))
