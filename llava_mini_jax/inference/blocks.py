"""A prompt in the pieces that are read of it: their sizes, and what stands at their places.

marks of a prompt, fused text, visual tokens --embeddings--> one block [S, D]
lengths of slots --fresh_sizes, block_sizes--> the sizes that programs are compiled for
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llava_mini_jax.data.batches.examples import power_of_two, powers_of_two
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.gallery import Seen
from llava_mini_jax.inference.work import Work
from llava_mini_jax.models import cache
from llava_mini_jax.models.compressors import Taken
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.splice import splice
from llava_mini_jax.params import Array

FRESH = 512  # positions of a prompt that are read together, at most
FRESH_ROWS = (1, 2, 4)  # prompts that are read together
BLOCKS = (32, 64, 128, 256, 512)  # positions of a prompt's later blocks
SCORES = 2**21  # of a head: a later block's positions times those of its slot, at most


def fresh_sizes(length: int) -> tuple[int, ...]:
    """Positions of prompts that are read from their beginning, in a lane of that length."""
    most = min(FRESH, length)
    return powers_of_two(min(bounds.SMALLEST_LENGTH, most), most)


def block_sizes(length: int) -> list[int]:
    """Positions of later blocks, in slots of so many.

    Fewer in a long one: their scores against all of its places are what a block's memory is.
    """
    # 1 << n.bit_length() - 1: the largest power of two up to n.
    most = min(length, 1 << max(16, SCORES // length).bit_length() - 1)
    return [size for size in BLOCKS if size <= most] or [most]


def block_size(left: int, length: int) -> int:
    """Positions of a prompt's next block, padding included."""
    sizes = block_sizes(length)
    return next((size for size in sizes if size >= left), sizes[-1])


def piece_size(count: int) -> int:
    """Positions of a piece that is read at once, padding included: at most an eighth too many."""
    step = max(BLOCKS[0], power_of_two(count) // 8)
    return -(-count // step) * step


def chosen_size(count: int, shown: bool, length: int, cfg: LlavaMiniConfig) -> tuple[int, int]:
    """Of a prompt of `count` positions that is read whole, in a slot of `length`, because later
    layers keep a choice of its image (where one is `shown`): positions, padding included, and
    those that later layers keep at most."""
    spare = cache.spare(cfg) if shown else 0
    # Later layers' caches have room for it: places.py's `needed`.
    room = length if shown else length - cache.spare(cfg)
    size = min(piece_size(count), room)
    return size, size - spare


def sizes_of(prompt: int, length: int) -> list[int]:
    """Positions of the pieces that a prompt is read in from its beginning, padding included; the
    first one is one of `fresh_sizes`."""
    fresh = fresh_sizes(length)
    read = min(prompt, fresh[-1])
    found = [next(size for size in fresh if size >= read)]
    while read < prompt:
        found.append(block_size(prompt - read, length))
        read += min(found[-1], prompt - read)
    return found


def embeddings(work: Work, first: int, count: int, size: int) -> Any:
    """What stands at `count` positions of a prompt, as embeddings [size, D]."""
    marks, text = work.marks[first : first + count], work.text_BTD.shape[1]
    visual_SD = np.zeros((size, work.text_BTD.shape[2]), work.text_BTD.dtype)
    is_visual = marks < 0
    # A position's place among the visual tokens, or among the text, counts those before it.
    visual_before = int((work.marks[:first] < 0).sum())
    order = np.cumsum(is_visual) - 1 + visual_before
    if is_visual.any():
        visual_SD[:count][is_visual] = work.visual_VD[order[is_visual]]
    text_order = np.cumsum(~is_visual) - 1 + first - visual_before
    slots_S = np.full(size, -1, np.int32)
    # Where nothing is text, its order may be -1: the place is not used.
    places = work.places_T[np.maximum(text_order, 0)] if len(work.places_T) else text_order
    slots_S[:count] = np.where(is_visual, text + np.arange(count), places)
    return splice_block(work.text_BTD, visual_SD, slots_S)


def visual(seen: Sequence[Seen], taken: Taken) -> np.ndarray:
    """The tokens [V, D] that a request takes of its media, in their order."""
    chunks = [chunk for one in seen for chunk in one.of(taken)]
    return np.concatenate(chunks) if chunks else np.zeros((0, 0))


@jax.jit
def splice_block(text_BTD: Array, visual_SD: Array, slots_S: Array) -> Array:
    """What stands at the places of a block [S, D]; `slots_S` are splice.py's."""
    return splice(text_BTD, visual_SD[None], slots_S[None])[0]
