"""How many tokens of an image a request takes, where its model has several numbers of them.

a request's vision_tokens (a number, "all", None) --chosen--> Example.tokens, or InputError
load's, --vision-tokens --with_unasked--> a Bundle whose requests have so many unless they ask

Which of an image's tokens these are says models/compressors/signature.py: Choice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError

ALL = "all"

VisionTokens = int | str | None


def counts_of(bundle: Bundle) -> tuple[int, ...]:
    """The numbers that a request may ask for, the smallest first."""
    choice = bundle.model.declared.choice
    own = bundle.model.tokens_per_image(bundle.images.parts)
    return (own,) if choice is None else choice.counts


def chosen(given: VisionTokens, bundle: Bundle) -> int | None:
    """What `given` says of an example's images; None: as many as the model gives unasked.

    Raises InputError for a number that the model does not have, and for any where its method
    decides itself.
    """
    if given is None:
        return None
    _check(given, bundle)
    counts, choice = counts_of(bundle), bundle.model.declared.choice
    number = counts[-1] if given == ALL else given
    if number not in counts:
        if choice is not None:
            listed = ", ".join(map(str, counts))
            raise InputError(
                f"vision_tokens is {number}, but this model has {listed} for an image: give one"
                f' of these, or "{ALL}"'
            )
        raise InputError(
            f"vision_tokens is {number}, but this model has {counts[0]} for an image and no other"
            " number: leave it out, or use a model of configs/compressors/nested.py"
        )
    assert isinstance(number, int)
    return None if choice is None else number


def vision_tokens_of(
    given: VisionTokens | Sequence[VisionTokens], prompts: int
) -> Sequence[VisionTokens]:
    """What each of several prompts is given: one for all, or one for each."""
    if given is None or isinstance(given, int | str | float):
        return [given] * prompts
    if len(given) != prompts:
        raise InputError(
            f"vision_tokens holds {len(given)} numbers for {prompts} prompts; give one for each, or"
            " one for all"
        )
    return given


def _check(given: Any, bundle: Bundle) -> None:
    model = bundle.model
    kind, declared = model.compressor.kind, model.declared
    if given != ALL and (isinstance(given, bool) or not isinstance(given, int)):
        raise InputError(
            f'vision_tokens is {given!r:.60}; give a number of tokens of an image, or "{ALL}"'
        )
    why = ""
    if declared.adaptive:
        why = "gives each image as many tokens as it deserves"
    elif declared.inside or model.inside_layers:
        why = "compresses inside the language model"
    if why:
        raise InputError(f'vision_tokens is {given}, but compressor "{kind}" {why}: leave it out')


def with_unasked(bundle: Bundle, given: VisionTokens) -> Bundle:
    """The bundle whose requests have `given` tokens of an image where they do not ask."""
    count = chosen(given, bundle)
    if count is None:
        return bundle
    compressor: Any = dataclasses.replace(bundle.model.compressor, **{"count": count})
    return dataclasses.replace(
        bundle, model=dataclasses.replace(bundle.model, compressor=compressor)
    )
