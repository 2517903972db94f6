"""XLA's own count of a forward pass: every component is lowered at full size, nothing is computed.

    config, Shape --abstract arrays--> each component's function --lower--> cost_analysis: FLOPs

XLA counts the body of a loop once, so layers are unrolled. It counts elementwise work too, which
the formulas (flops.py) leave out: up to 1.5 % of a component.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.cost.network import COMPONENTS, Shape, projected
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import clip, compressors, llama, llava_mini, projector
from llava_mini_jax.models.compressors.signature import INSTEAD
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.seen import PATCHES, Seen
from llava_mini_jax.params import Array


def abstract_params(cfg: LlavaMiniConfig) -> LlavaMini:
    """Parameters as shapes, layers unrolled: no memory is allocated."""
    return param_tree.abstract(llava_mini.unrolled(llava_mini.spec(cfg)), cfg.dtype)


def counted(function: Callable, *arguments: object) -> float:
    """FLOPs of `function` on arguments that may be abstract, before XLA's optimisations."""
    # On a mesh, if only of one device, products are not taken apart into loops (ops/einsum.py).
    with jax.set_mesh(sharding.make_mesh()):
        costs = jax.jit(function).lower(*arguments).cost_analysis()
    assert costs is not None
    return costs["flops"]


@functools.cache
def component_flops(cfg: LlavaMiniConfig, size: Shape) -> dict[str, float]:
    """FLOPs of a forward pass over one row with one image, by component (flops.COMPONENTS).

    Raises InputError for shapes with more, and for compression inside the language model.
    """
    if size.rows != 1 or size.images != 1 or cfg.inside_layers:
        raise InputError(
            "XLA's count by component covers one row with one image and compression before the"
            " language model; use the formula for other shapes"
        )
    if cfg.declared.reads != PATCHES or cfg.compress == INSTEAD:
        raise InputError(
            f'XLA counts nothing by component for compressor "{cfg.compressor.kind}"; use the'
            " formula"
        )
    params, D, S = abstract_params(cfg), cfg.llm.width, size.sequence
    whole, Q = cfg.patches_per_image(size.parts), cfg.tokens_per_image(size.parts)

    def array(*sizes: int, dtype: Any = cfg.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    found = dict.fromkeys(COMPONENTS, 0.0)
    side, see = cfg.vision.image_size, partial(clip.apply, cfg=cfg.vision, dtype=cfg.dtype)
    found["vision"] = counted(see, params.vision, array(size.parts, side, side, 3))
    for positions in filter(None, projected(cfg, size.parts)):
        features = array(1, positions, cfg.vision.width)
        found["projector"] += counted(projector.apply, params.projector, features)
    if cfg.compresses:
        compress = partial(compressors.apply, cfg=cfg.compressor)
        width = cfg.vision.width if cfg.compress == "features" else cfg.llm.width
        patches = Seen(array(1, cfg.detail_per_image(size.parts), width))
        found["compressor"] = counted(compress, params.compressor, patches)
    if cfg.prefusion_layers:
        fuse, text = partial(_prefuse, cfg=cfg), array(1, size.fused_text, D)
        found["prefusion"] = counted(fuse, params, array(1, whole, D), array(1, Q, D), text)
    llm, valid = partial(llama.run_whole, cfg=cfg.llm), array(1, S, dtype=jnp.bool_)
    found["llm"] = counted(llm, params.llm.layers, array(1, S, D), valid)
    found["lm_head"] = counted(llama.logits, params.llm, array(1, size.logits, D))
    return found


def _prefuse(
    params: LlavaMini,
    patches_ISD: Array,
    compressed_IQD: Array,
    text_IFD: Array,
    cfg: LlavaMiniConfig,
) -> tuple[Array, Array]:
    tokens, memory = llava_mini.prefuse_images(params, patches_ISD, compressed_IQD, cfg)
    return tokens, llava_mini.prefuse_text(params, memory, text_IFD, cfg)
