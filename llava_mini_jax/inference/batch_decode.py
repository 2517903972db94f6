"""Rows: checked requests to their answers, several at a time.

    Examples --batches--> rows of one kind and similar length
                             |
       encode_and_prefill, then decode a few tokens a call --new ids--> AnswerText of every row
                             ^                                              |
                             '------- rows that are done -------------------'

The number of rows is rounded up to a power of two with rows that are done before they begin, and
the room for answers likewise: both are shapes that a program is compiled for.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import (
    Buckets,
    Example,
    positions,
    power_of_two,
    powers_of_two,
)
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.inference import generate, recompute
from llava_mini_jax.inference.answer import AnswerText, Settings
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models.llava_mini import LlavaMini

SMALLEST_LENGTH = 64
SMALLEST_ROOM = 64  # 16 slots are not worth programs of their own: no answer was faster
# Tokens that one call on the device decodes: few where somebody waits for text, some where text
# may contain a stop string, many otherwise (a keyboard interrupt is noticed between calls).
STEPS_STREAMING, STEPS_WITH_STOP, STEPS = 2, 8, 64


def buckets_for(bundle: Bundle) -> Buckets:
    """Powers of two up to the longest prompt, and up to the images that would fill it."""
    longest = longest_prompt(bundle)
    return Buckets(
        lengths=powers_of_two(min(SMALLEST_LENGTH, longest), longest),
        images=powers_of_two(1, max(1, longest // tokens_per_image(bundle))),
    )


def tokens_per_image(bundle: Bundle) -> int:
    """Positions of the language model's first layer that a picture takes."""
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


def batches(examples: Sequence[Example], bundle: Bundle, batch_size: int) -> Iterator[list[int]]:
    """Numbers of the examples that go together: one kind of pixels, and of similar length."""
    kinds = [str(example.pixels.dtype) for example in examples]
    lengths = [positions(example, tokens_per_image(bundle)) for example in examples]
    for kind in sorted(set(kinds)):
        rows = [row for row in range(len(examples)) if kinds[row] == kind]
        # A batch is as long as its longest row.
        rows.sort(key=lambda row: lengths[row])
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def empty_texts(
    examples: Sequence[Example],
    bundle: Bundle,
    tokenizer: Any,
    stop_ids: Sequence[int],
    settings: Settings,
) -> list[AnswerText]:
    """Answers to come, each with the number of tokens that it may have."""
    texts = []
    for example in examples:
        most, limit = allowance(example, bundle, settings)
        texts.append(AnswerText(tokenizer, stop_ids, settings.stop, most, limit))
    return texts


def decode(
    params: LlavaMini,
    bundle: Bundle,
    buckets: Buckets,
    examples: Sequence[Example],
    texts: Sequence[AnswerText],
    stop_ids: tuple[int, ...],
    settings: Settings,
    steps: int,
) -> Iterator[list[str]]:
    """Generates until all `texts` are finished; yields the first tokens, then what calls add.

    `settings` hold a seed for each example.
    """
    padding = padding_rows(examples)
    sampling = make_sampling(
        len(examples) + len(padding),
        settings.temperature,
        settings.top_p,
        settings.top_k,
        settings.seeds(len(examples)) + [0] * len(padding),
        stop_ids,
    )
    if bundle.model.inside_layers:
        logits = recompute.whole_model(params, bundle, buckets)
        yield from recompute.decode(logits, [*examples, *padding], texts, sampling)
        return
    state = generate.encode_and_prefill(
        params,
        bundle.model,
        [*examples, *padding],
        buckets,
        longest_prompt(bundle),
        bundle.prompt.padding_side,
        room(texts),
    )
    calls = generate.Calls(
        params,
        state,
        sampling,
        bundle.model,
        steps=steps,
        most=max(text.allowance for text in texts),
    )
    yield from _pieces(calls, texts, ahead=runs_ahead(settings, steps))


def runs_ahead(settings: Settings, steps: int) -> bool:
    """Whether a call may be dispatched before the one in front of it is read.

    The device ends a call at stop tokens; behind a stop string all of its tokens are for nothing.
    """
    return not settings.stop or steps <= STEPS_STREAMING


def _pieces(
    calls: generate.Calls, texts: Sequence[AnswerText], *, ahead: bool
) -> Iterator[list[str]]:
    """`decode` behind the prompts; there may be more rows than texts."""
    new_BN = calls.first()
    while True:
        yield [text.push(new_BN[row]) for row, text in enumerate(texts)]
        left = [text.allowance for text in texts if not text.finish]
        if not left:
            return
        if not calls.unread:
            padding = [True] * (len(new_BN) - len(texts))
            calls.stop(np.array([bool(text.finish) for text in texts] + padding))
            calls.dispatch()
        # Not where a row may end by its allowance, which may be the last one that is not done.
        if ahead and calls.known < min(left):
            calls.dispatch()
        new_BN = calls.read()


def room(texts: Sequence[AnswerText]) -> int:
    """Tokens that there is room for: one of few sizes."""
    return power_of_two(max(SMALLEST_ROOM, *(text.allowance for text in texts)))


def padding_rows(examples: Sequence[Example]) -> list[Example]:
    """Rows that make `examples` a power of two; without a position, they are done at once."""
    none = np.zeros(0, np.int32)
    empty = Example(none, none.astype(bool), none + IGNORE, examples[0].pixels[:0], ())
    return [empty] * (power_of_two(len(examples)) - len(examples))
