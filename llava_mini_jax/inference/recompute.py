"""Answers without a KV cache: every token is computed from the whole sequence anew.

    Examples --logits behind the last position--> a token each --appended--> Examples, one longer

For what keeps nothing from token to token: compression inside the language model (paper table 12),
where a new token changes what the compressor reads, and analyses that change the language model's
layers (paper figure 5). Slow, and all that these need: the cache stays free of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import sharding
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Example,
    collate,
    power_of_two,
    powers_of_two,
)
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.answer import AnswerText, Settings
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.sampling import Sampling, make_sampling, next_token
from llava_mini_jax.inference.ticket import Piece
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array

Logits = Callable[[Sequence[Example]], Array]  # [B, V] behind each example's last position


def refuse_inside(cfg: LlavaMiniConfig) -> None:
    """InputError for what no cache holds, where one is needed.

    That is compression inside the language model.
    """
    if cfg.declared.inside and not cfg.keeps_cache:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" continues inside the language model and decodes'
            ' without a cache: use Model.generate or eval.py, FastV\'s variant "drop", or a'
            " method that compresses before it"
        )
    if cfg.inside_layers:
        raise InputError(
            f"the model compresses after layer {cfg.inside_layers} of its LLM and decodes without"
            " a cache: use Model.generate or eval.py, or a model that compresses before the LLM"
        )


def refuse_own_layers(cfg: LlavaMiniConfig) -> None:
    """InputError for a model whose language model's layers do not just follow each other, where
    an analysis runs them by itself."""
    refuse_question(cfg)
    if cfg.declared.inside or cfg.inside_layers:
        what = f"after layer {cfg.inside_layers} of its LLM" if cfg.inside_layers else "in its LLM"
        raise InputError(
            f'the model compresses {what} (compressor "{cfg.compressor.kind}"), whose layers this'
            " analysis runs one by one; use a model that compresses before it"
        )


def refuse_pooled(example: Example, cfg: LlavaMiniConfig) -> None:
    """InputError for several images of a method whose images change each other's tokens.

    The engine looks at one image a call, which would not be what the method does with them.
    """
    if cfg.declared.pooled and sum(example.frames) > 1:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" shares one ratio among the images of a call, and'
            f" the prompt has {sum(example.frames)}: give one image, or set its variant to clean"
        )


def refuse_question(cfg: LlavaMiniConfig) -> None:
    """InputError for a compressor that reads the question, where images are seen without one."""
    if cfg.declared.reads.question:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" reads the question about an image, and'
            " none is given here; use ask, eval.py or the server, or another method"
        )


def decode(
    logits: Logits, examples: Sequence[Example], texts: Sequence[AnswerText], sampling: Sampling
) -> Iterator[list[str]]:
    """Generates until all `texts` are finished; yields each one's new text, token by token.

    There may be more examples than texts, and the rows behind them are padding.
    """
    for step in itertools.count():
        token_B = np.asarray(_next(logits(examples), sampling, np.int32(step)))
        yield [text.push([token]) for text, token in zip(texts, token_B, strict=False)]
        if all(text.finish for text in texts):
            return
        going = [*(not text.finish for text in texts), *[False] * (len(examples) - len(texts))]
        examples = [
            _longer(example, token) if goes else example
            for example, token, goes in zip(examples, token_B, going, strict=True)
        ]


_next = jax.jit(next_token)


def answering(
    model: Loaded,
    examples: Sequence[Example],
    settings: Sequence[Settings],
    batch_size: int,
    hear: Callable[[int, Piece], None],
    *,
    logits: Logits | None = None,
    **_: int,
) -> Iterator[None]:
    """engine.py's `answering`, without a cache: each `next` is a token of a batch.

    Batches have the settings of their first example, but for seeds. Without `logits`, the model's.
    """
    for one in settings:
        one.refuse_for_engine("a model that answers without a cache")
    logits = logits or whole_model(model.params, model.bundle, model.buckets)
    for numbers in batches(examples, model.bundle, batch_size):
        rows = [examples[number] for number in numbers]
        own = [model.with_stop_text(settings[number]) for number in numbers]
        texts = [
            bounds.empty_text(row, model.bundle, model.tokenizer, model.stop_ids, s)
            for row, s in zip(rows, own, strict=True)
        ]
        rows += padding_rows(rows)
        s = own[0]
        seeds = [one.seeds(1)[0] for one in own] + [0] * (len(rows) - len(texts))
        sampling = make_sampling(len(rows), s.temperature, s.top_p, s.top_k, seeds, model.stop_ids)
        before, done = [0] * len(texts), set[int]()
        for pieces in decode(logits, rows, texts, sampling):
            for place, (number, text) in enumerate(zip(numbers, texts, strict=True)):
                if number in done:
                    continue
                answer = text.answer if text.finish else None
                hear(number, Piece(pieces[place], text.ids[before[place] :], answer=answer))
                before[place] = len(text.ids)
                if answer is not None:
                    done.add(number)
            yield


def batches(examples: Sequence[Example], bundle: Bundle, batch_size: int) -> Iterator[list[int]]:
    """Numbers of the examples that go together: one kind of pixels, and of similar length."""
    kinds = [str(example.pixels.dtype) for example in examples]
    lengths = [bounds.prompt_positions(example, bundle) for example in examples]
    for kind in sorted(set(kinds)):
        rows = [row for row in range(len(examples)) if kinds[row] == kind]
        # A batch is as long as its longest row.
        rows.sort(key=lambda row: lengths[row])
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def padding_rows(examples: Sequence[Example]) -> list[Example]:
    """Rows that make `examples` a power of two; without a position, they are done at once."""
    none = np.zeros(0, np.int32)
    empty = Example(none, none.astype(bool), none + IGNORE, examples[0].pixels[:0], ())
    return [empty] * (power_of_two(len(examples)) - len(examples))


def _longer(example: Example, token: int) -> Example:
    """With a token of its answer, which takes no part in pre-fusion."""
    return dataclasses.replace(
        example,
        ids=np.append(example.ids, np.int32(token)),
        fuse=np.append(example.fuse, False),
        labels=np.append(example.labels, np.int32(IGNORE)),
    )


def inputs_of(examples: Sequence[Example], bundle: Bundle, buckets: Buckets) -> Inputs:
    """A batch of prompts with as much of their answers as there is."""
    cfg, parts = bundle.model, bundle.images.parts
    longest = cfg.llm.max_positions
    layout = BatchLayout.of(
        cfg,
        parts,
        buckets=Buckets(powers_of_two(min(buckets.lengths[0], longest), longest), buckets.images),
        padding_side=bundle.prompt.padding_side,
        max_length=longest,
    )
    return sharding.put_batch(collate(examples, layout, truncate=False).inputs)


def whole_model(params: LlavaMini, bundle: Bundle, buckets: Buckets) -> Logits:
    """The model's own logits."""
    return lambda rows: whole_logits(params, inputs_of(rows, bundle, buckets), bundle.model)


@partial(jax.jit, static_argnames="cfg")
def whole_logits(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    hidden_BSD = llava_mini.apply(params, inputs, cfg)
    return last_logits(params.llm, hidden_BSD, inputs.slots_BS)


def last_logits(llm: llama.Llama, hidden_BSD: Array, slots_BS: Array) -> Array:
    """Logits [B, V] behind the last valid position of normed hidden states."""
    last_B = jnp.where(slots_BS >= 0, jnp.arange(slots_BS.shape[1]), 0).max(axis=1)
    last_B1D = jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)
    return llama.logits(llm, last_B1D)[:, 0]
