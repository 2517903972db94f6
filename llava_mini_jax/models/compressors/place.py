"""Whether a compressor may stand where a model puts it: one sentence for each that may not.

declaration, place, the model's other switches --check--> nothing, or ValueError
"""

from llava_mini_jax.models.compressors.signature import (
    INSTEAD,
    PLACES,
    PROJECTED,
    Choice,
    Declaration,
)
from llava_mini_jax.models.seen import PATCHES


def check(
    kind: str,
    declared: Declaration,
    place: str,
    *,
    prefusion_layers: int,
    fuse_compressed: bool,
    inside_layers: int,
    layers: int,
    vocabulary: int,
) -> None:
    if place not in PLACES:
        raise ValueError(f'compress "{place}" is unknown; use one of {", ".join(PLACES)}')
    if place not in declared.places:
        raise ValueError(
            f'compressor "{kind}" cannot be put at compress "{place}"; use '
            f"{' or '.join(declared.places)}"
        )
    if prefusion_layers and place == INSTEAD:
        raise ValueError(
            f'compressor "{kind}" is the projector, so pre-fusion has no patches to read: set'
            " prefusion_layers to 0"
        )
    if prefusion_layers and fuse_compressed and declared.adaptive:
        raise ValueError(
            f'compressor "{kind}" gives images different numbers of tokens, which cannot go'
            " through pre-fusion: set fuse_compressed to false"
        )
    if declared.choice is not None:
        _check_choice(kind, declared.choice, prefusion_layers, fuse_compressed)
    if inside_layers and (prefusion_layers or not declared.compresses):
        raise ValueError("compression inside the LLM needs a compressor and no pre-fusion layers")
    if declared.inside and (prefusion_layers or inside_layers):
        raise ValueError(
            f'compressor "{kind}" continues inside the LLM: set prefusion_layers and inside_layers'
            " to 0"
        )
    if not declared.behind < layers:
        raise ValueError(
            f'compressor "{kind}" acts before layer {declared.behind}, counted from 0, of an LLM'
            f" of {layers}: give an earlier layer"
        )
    if vocabulary < declared.vocabulary:
        raise ValueError(
            f'compressor "{kind}" has a token of id {declared.vocabulary - 1}, but the LLM knows'
            f" {vocabulary} tokens: give the id of one that it knows"
        )
    if inside_layers and (
        PROJECTED not in declared.places
        or declared.reads != PATCHES
        or declared.adaptive
        or declared.choice is not None
    ):
        raise ValueError(
            f'compressor "{kind}" does not work on hidden states of the LLM: set inside_layers to 0'
        )


def _check_choice(kind: str, choice: Choice, prefusion_layers: int, fuse_compressed: bool) -> None:
    if prefusion_layers and fuse_compressed:
        # The question would read the tokens of all counts, whatever it asks for.
        raise ValueError(
            f'compressor "{kind}" gives the tokens of all its counts, which cannot go through'
            " pre-fusion together: set fuse_compressed to false"
        )
    if 0 in choice.counts and not prefusion_layers:
        raise ValueError(
            f'compressor "{kind}" with 0 tokens and no pre-fusion would leave nothing of an image:'
            " remove 0 from its counts, or set prefusion_layers to 1 or more"
        )


def check_widths(kind: str, declared: Declaration, tower: int, llm: int) -> None:
    if declared.widths not in (None, (tower, llm)):
        raise ValueError(
            f'compressor "{kind}" is made for widths {declared.widths} of tower and language model,'
            f" which have {(tower, llm)}: give it theirs"
        )


def check_pictures(kind: str, declared: Declaration, images: int, parts: int) -> None:
    """ValueError for a call's images that the method is not defined on."""
    if parts > 1 and not declared.parts:
        raise ValueError(
            f'compressor "{kind}" is defined on whole images, not on {parts} parts of one: set'
            " the images' grid to 1"
        )
    if images > 1 and declared.pooled:
        raise ValueError(
            f'compressor "{kind}" shares one ratio among the {images} images of a call, padding'
            " among them: give one image, or set its variant to clean"
        )
