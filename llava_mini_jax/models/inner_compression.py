"""Compression inside the language model: the ablation of paper appendix E.3, table 12.

    [ text | all patches ] --llm.layers[:N]--> hidden --patches: compressor--> [ text | C*C tokens ]
                                                                                    |
                                                                    llm.layers[N:], norm, head

The first N layers do what pre-fusion does, so there is none; the compressor reads hidden states
instead of patches. The sequence is shorter from layer N on, where positions are counted anew.

Dimensions: B rows, I images, U positions of the long sequence, S of the short one, T text,
V = I * P visual tokens of a row, Q compressed tokens of an image, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.models import compressors
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.llama import Llama
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.splice import splice
from llava_mini_jax.ops.layers import some_layers
from llava_mini_jax.params import Array


def split_llm(llm: Llama, first: int) -> tuple[Llama, Llama]:
    """The first layers of the language model, and the rest of it (embedding and head in both)."""

    def part(start: int, end: int | None) -> Llama:
        return dataclasses.replace(llm, layers=some_layers(llm.layers, start, end))

    return part(0, first), part(first, None)


def squeeze(
    params: Any,
    hidden_BUD: Array,
    wide_slots_BU: Array,
    slots_BS: Array,
    sizes: tuple[int, int, int, int],
    cfg: CompressorConfig,
) -> Array:
    """The short sequence [B, S, D] from the long one's hidden states.

    `sizes` are T, I, P and how many of an image's patches are compressed (with high resolution not
    those of the whole image, which stand last). `wide_slots_BU` says what stood where in the long
    sequence (models/splice.py), `slots_BS` what stands where in the short one: nothing that was cut
    from the long one (data/batches/examples.py).
    """
    T, I, P, detail = sizes
    B, U, D = hidden_BUD.shape
    sources = T + I * P

    def places(slots_U: Array) -> Array:
        """Where each text position and visual token stood: the inverse of the row's slots."""
        # Padding goes out of range, where the scatter drops it. What was cut keeps place 0, unread.
        kept_U = jnp.where(slots_U >= 0, slots_U, sources)
        return jnp.zeros(sources, jnp.int32).at[kept_U].set(jnp.arange(U), mode="drop")

    places_BW = jax.vmap(places)(wide_slots_BU)
    source_BWD = jnp.take_along_axis(hidden_BUD, places_BW[..., None], axis=1)
    patches_IPD = source_BWD[:, T:].reshape(B, I, P, D).reshape(B * I, P, D)
    tokens_IQD = compressors.apply(params, Seen(patches_IPD[:, :detail]), cfg).tokens_IQE
    # Split first, then joined: on a mesh JAX refuses to do both to a sharded axis at once.
    Q = tokens_IQD.shape[1]
    visual_BVD = tokens_IQD.reshape(B, I, Q, D).reshape(B, I * Q, D)
    return splice(source_BWD[:, :T], visual_BVD, slots_BS)
