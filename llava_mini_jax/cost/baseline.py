"""The model that LLaVA-Mini is compared with: its own parts without compression and pre-fusion.

    LLaVA-Mini's config and parameters --> LLaVA-1.5's, with the same tower, projector and LLM

No weight is held twice. Nobody trained this baseline: it serves for what something costs, and not
for how well it answers.
"""

import dataclasses
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.models.compressors import GridConfig
from llava_mini_jax.models.compressors.signature import INSTEAD, PROJECTED
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig


def llava_1_5(cfg: LlavaMiniConfig) -> LlavaMiniConfig:
    """The configuration with every patch as a token and no pre-fusion.

    Raises InputError for a model without a projector of its own.
    """
    if cfg.compress == INSTEAD:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" is the projector, so the model has none to make a'
            " LLaVA-1.5 of: compare it with a folder of LLaVA-1.5"
        )
    every_patch = GridConfig(kind="none", width=cfg.llm.width, heads=1, grid=1, norm_eps=1e-5)
    return dataclasses.replace(
        cfg,
        compressor=every_patch,
        compress=PROJECTED,
        prefusion_layers=0,
        inside_layers=0,
    )


def shared_params(params: LlavaMini) -> LlavaMini:
    """The parameters (arrays, or abstract ones) of `llava_1_5`: the same objects, fewer of them."""
    nothing: Any = None
    return dataclasses.replace(params, compressor=nothing, prefusion=nothing)
