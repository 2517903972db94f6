"""The model that LLaVA-Mini is compared with: its own parts without compression and pre-fusion.

    LLaVA-Mini's config and parameters --> LLaVA-1.5's, with the same tower, projector and LLM

No weight is held twice. Nobody trained this baseline: it serves for what something costs, and not
for how well it answers.
"""

import dataclasses
from typing import Any

from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig


def llava_1_5(cfg: LlavaMiniConfig) -> LlavaMiniConfig:
    """The configuration with every patch as a token and no pre-fusion."""
    return dataclasses.replace(
        cfg,
        compressor=dataclasses.replace(cfg.compressor, kind="none"),
        prefusion_layers=0,
        inside_layers=0,
    )


def shared_params(params: LlavaMini) -> LlavaMini:
    """The parameters (arrays, or abstract ones) of `llava_1_5`: the same objects, fewer of them."""
    nothing: Any = None
    return dataclasses.replace(params, compressor=nothing, prefusion=nothing)
