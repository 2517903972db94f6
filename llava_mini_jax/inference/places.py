"""What of a prompt stays in its slot, where a compressor's images leave the cache (VoCo).

    positions   [ text | patches, VoCo | text ]    as the language model counts them
    places      [ text | VoCo | text ]             of the slot

positions of images --the compressor's `pieces`--> what is read together, how much of it stays

For all other models a position is a place.
"""

from collections.abc import Sequence

import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds
from llava_mini_jax.models import cache, compressors
from llava_mini_jax.models.compressors import Piece


def pieces(is_visual_S: np.ndarray, bundle: Bundle) -> list[Piece]:
    """Of a prompt with images' tokens at these positions."""
    if bundle.model.declared.keeps is None or cache.chooses(bundle.model):
        return []
    pictures = np.flatnonzero(is_visual_S).reshape(-1, bounds.tokens_per_image(bundle))
    spans = [(int(places[0]), int(places[-1]) + 1) for places in pictures]
    return compressors.pieces(spans, bundle.model.compressor)


def place(pieces: Sequence[Piece], position: int) -> int:
    """Where the position stands, or would, in the slot; it is inside of no piece."""
    left = sum(piece.end - piece.first - piece.kept for piece in pieces if piece.end <= position)
    return position - left


def whole(pieces: Sequence[Piece], position: int) -> int:
    """The position, or the first one of the piece that it is inside of."""
    within = [piece.first for piece in pieces if piece.first < position < piece.end]
    return min(within, default=position)


def needed(example: Example, bundle: Bundle) -> int:
    """Places of a slot that a prompt takes, at most."""
    if bundle.model.declared.keeps is None:
        return bounds.prompt_positions(example, bundle)
    frames, tokens, parts = iter(example.frames), bounds.tokens_per_image(bundle), []
    for id_ in example.ids:
        parts.append(np.ones(next(frames) * tokens, bool) if id_ < 0 else np.zeros(1, bool))
    return needed_by(np.concatenate(parts), bundle)


def needed_by(is_visual_S: np.ndarray, bundle: Bundle) -> int:
    """The same of a prompt with images' tokens at these positions."""
    if cache.chooses(bundle.model):
        # The first layers hold all of it; later ones have `spare` places less, and no image's
        # choice makes room there for text alone.
        return len(is_visual_S) + (0 if is_visual_S.any() else cache.spare(bundle.model))
    return place(pieces(is_visual_S, bundle), len(is_visual_S))


def fitting(example: Example, bundle: Bundle, longest: int) -> int:
    """`needed`; InputError where that is more than the longest slot has for a prompt."""
    places = needed(example, bundle)
    if places > longest:
        raise InputError(
            f"the prompt needs {places} positions, but the engine's longest slot has {longest} for"
            " it: shorten it, give fewer images or frames, or start the engine with longer slots"
        )
    return places
