"""How long prompts and answers may be, and how many tokens a call decodes."""

from collections.abc import Sequence
from typing import Any

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import (
    Buckets,
    Example,
    positions,
    power_of_two,
    powers_of_two,
)
from llava_mini_jax.inference.answer import AnswerText, Settings
from llava_mini_jax.inference.vision_tokens import counts_of
from llava_mini_jax.models import cache

SMALLEST_LENGTH = 64
# Tokens that one call on the device decodes: few where somebody waits for text, some where text
# may contain a stop string, many otherwise (a keyboard interrupt is noticed between calls).
STEPS_STREAMING, STEPS_WITH_STOP, STEPS = 2, 8, 64


def buckets_for(bundle: Bundle) -> Buckets:
    """Powers of two up to the longest prompt, and up to the images that would fill it."""
    longest, fewest = longest_prompt(bundle), counts_of(bundle)[0]
    return Buckets(
        lengths=powers_of_two(min(SMALLEST_LENGTH, longest), longest),
        images=powers_of_two(1, max(1, longest // max(1, fewest))),
    )


def tokens_per_image(bundle: Bundle) -> int:
    """Positions of the language model's first layer that an image takes, of a request that does
    not ask for another number (vision_tokens.py)."""
    return bundle.model.positions_per_image(bundle.images.parts)


def longest_prompt(bundle: Bundle) -> int:
    """Positions that a prompt may take: one is left for the answer."""
    return min(bundle.prompt.max_length, bundle.model.llm.max_positions - 1)


def prompt_positions(example: Example, bundle: Bundle) -> int:
    """Positions of the language model that a prompt takes."""
    return positions(example, tokens_per_image(bundle))


def allowance(example: Example, bundle: Bundle, settings: Settings) -> tuple[int, str]:
    """(tokens that an answer may have, `finish` of one that has them all)."""
    left = bundle.model.llm.max_positions - prompt_positions(example, bundle)
    limit = "length" if settings.max_new_tokens <= left else "context"
    return min(settings.max_new_tokens, left), limit


def empty_text(
    example: Example, bundle: Bundle, tokenizer: Any, stop_ids: Sequence[int], settings: Settings
) -> AnswerText:
    """An answer to come, with the number of tokens that it may have."""
    most, limit = allowance(example, bundle, settings)
    stop, quiet = settings.stop, settings.min_tokens
    return AnswerText(tokenizer, stop_ids, stop, most, limit, quiet=quiet)


def slot_length(prompt: int, answer: int, bundle: Bundle) -> int:
    """Positions of a conversation's slot, for a prompt and an answer of so many: one of few sizes.

    A conversation grows, and each size is compiled for: 512 more at a time, or an eighth.
    """
    needed = prompt + answer
    step = max(512, power_of_two(needed) // 8)
    most = bundle.model.llm.max_positions + cache.spare(bundle.model)
    return min(-(-needed // step) * step, most)
