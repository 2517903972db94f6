"""Answers token by token, with the logits that each was chosen from, to be held to recorded ones.

    Examples --seeing.py--> fused text, visual tokens --blocks.py--> prompts, one a slot
        --reading.fresh_logits--> logits --a token--> slots.next_logits --> logits --> ...

The engine's `decode` has the same step in a loop on the device, and keeps no logits.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.data.batches.examples import Example, power_of_two
from llava_mini_jax.inference import blocks, reading, slots
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import media_of
from llava_mini_jax.inference.gallery import Gallery
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.sampling import Sampling, is_end, next_token
from llava_mini_jax.inference.seeing import Seeing
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.inference.ticket import Request, Ticket
from llava_mini_jax.inference.work import Work, mark_visual


class Answers(NamedTuple):
    tokens_BN: np.ndarray  # a row that has ended goes on, and nobody means what it says
    logits_BNV: np.ndarray  # float32, that each token was chosen from
    ended_B: np.ndarray  # by a stop token


def answers(model: Loaded, examples: Sequence[Example], sampling: Sampling, most: int) -> Answers:
    """Up to `most` tokens of each example, until all have met a stop token of `sampling`."""
    works = seen(model, examples)
    rows, cfg = len(works), model.bundle.model
    size = power_of_two(max(len(work.marks) for work in works))
    lane = slots.empty(rows, size + most, cfg)
    x = tuple(blocks.embeddings(work, 0, len(work.marks), size) for work in works)
    count_R = jnp.array([len(work.marks) for work in works], jnp.int32)
    lane, logits_BV = _first(model.params, lane, x, count_R, jnp.arange(rows), cfg)
    lane = dataclasses.replace(lane, used_B=count_R)
    ended_B, tokens, logits = np.zeros(rows, bool), [], []
    for step in range(most):
        token_B = _choose(logits_BV, sampling, jnp.int32(step))
        tokens.append(np.asarray(token_B))
        logits.append(np.asarray(logits_BV))
        ended_B |= np.asarray(_ends(token_B, sampling))
        if ended_B.all():
            break
        lane = dataclasses.replace(lane, token_B=token_B)
        lane, logits_BV = _next(model.params, lane, cfg)
        lane = dataclasses.replace(lane, used_B=lane.used_B + 1)
    return Answers(np.stack(tokens, axis=1), np.stack(logits, axis=1), ended_B)


_first = jax.jit(reading.fresh_logits, static_argnames="cfg")
_next = jax.jit(slots.next_logits, static_argnames="cfg")
_choose, _ends = jax.jit(next_token), jax.jit(is_end)


def seen(model: Loaded, examples: Sequence[Example]) -> list[Work]:
    """The examples with their images seen and their text fused."""
    failures: list[Exception] = []
    fail = lambda work, error: failures.append(error)  # noqa: E731
    seeing = Seeing(model, Gallery(Budget(host=0)), fail, timed=False, chunk=None)
    settings, found = Settings(ignore_end=True), []
    for example in examples:
        request = Request(example, media_of(example), settings)
        found.append(Work(Ticket(request, lambda news: None), model))
        seeing.add(found[-1])
    while seeing.works and not failures:
        seeing.step(None)
    if failures:
        raise failures[0]
    for work in found:
        example = work.ticket.request.example
        work.marks = mark_visual(work.seen, example.ids, example.fuse, work.taken)
        work.visual_VD = blocks.visual(work.seen, work.taken)
    return found
