"""What the queries of the compressor look at in an image (paper appendix F, figure 12).

    parts [I, J, Y, X, C] --tower--> patches --compressor--> attention [I, Q, P], rows sum to 1
                          '--> the image as the model sees it, its sub-images put together

For high resolution the map is over all sub-images as one, which is what is compressed. In a video
every frame has a map of its own.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.recompute import refuse_inside, refuse_question
from llava_mini_jax.models import compressors, llava_mini, projector
from llava_mini_jax.models.compressors.signature import PROJECTED
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.parts import what_is_compressed
from llava_mini_jax.params import Array

CHUNK = 8  # images or frames at a time
WITH_QUERIES = ("similarity", "multi_head")  # the kinds of compressor that attend to patches


def maps(params: LlavaMini, pixels_IJYXC: np.ndarray, cfg: LlavaMiniConfig) -> np.ndarray:
    """Attention [I, Q, side, side] of the queries of every image or frame over its patches.

    Raises InputError for models whose compressor has no attention over the image alone.
    """
    if cfg.compressor.kind not in WITH_QUERIES:
        raise InputError(
            f'the model\'s compressor is "{cfg.compressor.kind}", which has no queries; use a'
            " LLaVA-Mini with query-based compression"
        )
    refuse_inside(cfg)
    refuse_question(cfg)
    found = []
    for start in range(0, len(pixels_IJYXC), CHUNK):
        now = pixels_IJYXC[start : start + CHUNK]
        # The last chunk is filled up, so that one program serves all.
        size = min(CHUNK, len(pixels_IJYXC))
        filled = np.zeros((size, *now.shape[1:]), now.dtype)
        filled[: len(now)] = now
        found.append(np.asarray(attention(params, filled, cfg))[: len(now)])
    attention_IQP = np.concatenate(found)
    side = round(attention_IQP.shape[2] ** 0.5)
    return attention_IQP.reshape(*attention_IQP.shape[:2], side, side)


@partial(jax.jit, static_argnames="cfg")
def attention(params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig) -> Array:
    """[I, Q, P], for a chunk of images or frames."""
    seen, _ = what_is_compressed(llava_mini.encode_vision(params, pixels_IJYXC, cfg))
    if params.projector is not None and cfg.compress == PROJECTED:
        projected = projector.apply(params.projector, seen.patches_IPE)
        seen = dataclasses.replace(seen, patches_IPE=projected)
    attention_IQP = compressors.apply(params.compressor, seen, cfg.compressor).attention_IQP
    assert attention_IQP is not None
    return attention_IQP.astype(jnp.float32)


def assembled(parts_JYXC: np.ndarray) -> np.ndarray:
    """The image that is compressed, [k*Y, k*X, C]: its sub-images joined, or the only part."""
    J, Y, X, C = parts_JYXC.shape
    if J == 1:
        return parts_JYXC[0]
    k = round((J - 1) ** 0.5)
    tiles = parts_JYXC[:-1].reshape(k, k, Y, X, C)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(k * Y, k * X, C)


def evenness(map_YX: np.ndarray) -> float:
    """Entropy over log of the number of patches: 1 is average pooling, 0 a single patch."""
    p = map_YX.reshape(-1).astype(np.float64)
    p = p / p.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(p.size))


def position_note(cfg: LlavaMiniConfig) -> str | None:
    """What is missing for one query in the release's dialect; None where positions tell."""
    if cfg.compressor.kind != "multi_head" or cfg.tokens_per_image(1) > 1:
        return None
    return (
        "C = 1, release's dialect: its position table has one entry, which is resized to the same"
        " vector at every patch. Added to all keys alike it drops out of the softmax, so the query"
        " knows where a patch lies only from what the tower put into it: the map shows what is"
        " looked for, not where, and equal patches would get equal weight wherever they lie."
    )
