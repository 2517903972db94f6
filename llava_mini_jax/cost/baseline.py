"""The model that LLaVA-Mini is compared with: its own parts without compression and pre-fusion.

    LLaVA-Mini's config and parameters --> LLaVA-1.5's, with the same tower, projector and LLM

No weight is held twice. Nobody trained this baseline: it serves for what something costs, and not
for how well it answers.
"""

import dataclasses
from typing import Any

from llava_mini_jax import config as configs
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig

BACKBONES = {
    "vicuna-7b": configs.VICUNA_7B,
    "vicuna-13b": configs.VICUNA_13B,
    "llama-3.1-8b": configs.LLAMA_3_1_8B,
}


def backbone(name: str) -> LlamaConfig:
    """A named language model; InputError for a name that is unknown."""
    if name not in BACKBONES:
        raise InputError(f'backbone "{name}" is unknown; use one of {", ".join(BACKBONES)}')
    return BACKBONES[name]


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
