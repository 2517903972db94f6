"""What a client asks, as what the engine is asked; tokenising and reading, so never on the loop.

ChatFields --chat_prompt: template, tokenizer--> EncodedPrompt, parts --MediaReader--> Media
text of a completion --text_prompt-------------> EncodedPrompt            |
                                   requests: checked to fit, one for each choice
"""

import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import make_example, positions
from llava_mini_jax.data.text.conversation import EncodedPrompt, Template, Turn, encode
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.request import encode_turns
from llava_mini_jax.inference.sampling import row_seed
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.inference.vision_tokens import chosen
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fields import ChatFields, CompletionFields, Fields
from llava_mini_jax.serving.messages import Conversation
from llava_mini_jax.serving.parts import VideoOptions

_BARE = Template(name="text")  # nothing around a text but what the tokenizer puts in front
_SEEDS = 2**32


@dataclass(frozen=True)
class Defaults:
    """What a model's generation_config.json says of sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def chosen_tokens(fields: Fields, bundle: Bundle) -> int | None:
    """`Example.tokens`; ApiError for a number of tokens an image that the model does not have."""
    try:
        return chosen(fields.vision_tokens if isinstance(fields, ChatFields) else None, bundle)
    except InputError as error:
        raise ApiError(400, str(error), param="vision_tokens") from error


def chat_prompt(
    asked: Conversation, model: Model, context: int, vision_tokens: int | None = None
) -> EncodedPrompt:
    """InputError for a conversation that the template or the tokenizer cannot write, ApiError for
    one whose text alone is too long."""
    turns = [*asked.turns, Turn("assistant", None)]
    prompt = encode_turns(turns, len(asked.marks), model.bundle, model.tokenizer, "messages")
    # Of films there will be more.
    each = bounds.tokens_per_image(model.bundle) if vision_tokens is None else vision_tokens
    taken = each * len(asked.media)
    _check_length(int((prompt.ids >= 0).sum()) + taken, None, model.bundle, context)
    return prompt


def text_prompt(text: str, model: Model) -> EncodedPrompt:
    """A text as it stands, without a template: special tokens in it are letters, too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("prompt has half of a surrogate pair; send valid Unicode") from None
    turns = [Turn("user", text, ()), Turn("assistant", None)]
    prompt = encode(_BARE, turns, model.tokenizer, double_bos=False)
    if not len(prompt.ids):
        raise InputError("prompt has no tokens; give some text")
    if prompt.ids.max() >= model.bundle.model.llm.vocab_size:
        raise InputError("prompt has a token that the model does not know")
    return prompt


def joined(media: Sequence[Medium], marks: Sequence[Sequence[object]]) -> list[Medium]:
    """One medium for each mark: several images of one are the frames of a film."""
    given = iter(media)
    return [_film([next(given) for _ in mark]) for mark in marks]


def _film(frames: Sequence[Medium]) -> Medium:
    if len(frames) == 1:
        return frames[0]
    known = all(frame.key for frame in frames)
    key = hashlib.sha256(b"".join(frame.key for frame in frames)).digest() if known else b""
    return Medium(
        key,
        sum(frame.frames for frame in frames),
        lambda: itertools.chain.from_iterable(frame.read() for frame in frames),
    )


def video_options(fields: ChatFields) -> VideoOptions:
    video = fields.media_io_kwargs and fields.media_io_kwargs.video
    return VideoOptions(video.num_frames, video.fps) if video else VideoOptions()


def requests(
    prompt: EncodedPrompt,
    media: Sequence[Medium],
    fields: Fields,
    model: Model,
    context: int,
    defaults: Defaults,
    tenant: str,
) -> list[Request]:
    """One for each choice. ApiError where prompt and answer do not fit `context` positions."""
    none = np.zeros((0, 1, 1, 1, 3), np.uint8)
    frames = tuple(medium.frames for medium in media)
    tokens = chosen_tokens(fields, model.bundle)
    example = make_example(prompt, none, frames, model.bundle.prompt, training=False, tokens=tokens)
    taken = positions(example, bounds.tokens_per_image(model.bundle))
    left = _check_length(taken, fields.limit, model.bundle, context)
    settings = _settings(fields, defaults, left, model.bundle)
    assert isinstance(settings.seed, int)
    return [
        Request(
            example, media, dataclasses.replace(settings, seed=row_seed(settings.seed, n)), tenant
        )
        for n in range(fields.n)
    ]


def _check_length(taken: int, limit: int | None, bundle: Bundle, context: int) -> int:
    """Positions that are left for an answer; ApiError where there are too few."""
    longest = min(bounds.longest_prompt(bundle), context - 1)
    if taken > longest:
        told = f"your prompt has {taken}"
        room = f" (of a prompt {longest})" * (longest < context - 1)
    elif limit is not None and taken + limit > context:
        told, room = f"your prompt has {taken} and the answer may have {limit}", ""
    else:
        return context - taken
    raise ApiError(
        400,
        f"maximum context length is {context} tokens{room}; {told}: shorten the text, give fewer "
        "images or frames, or ask for fewer tokens",
        param="input_tokens",
    )


def _settings(fields: Fields, defaults: Defaults, left: int, bundle: Bundle) -> Settings:
    def chosen(given: float | None, default: float) -> float:
        return default if given is None else given

    vocabulary = bundle.model.llm.vocab_size
    if too_large := [token for token in fields.stop_token_ids if token >= vocabulary]:
        raise ApiError(
            400,
            f"stop_token_ids has {too_large[0]}; the model knows {vocabulary} tokens",
            param="stop_token_ids",
        )
    return Settings(
        max_new_tokens=fields.limit or left,
        temperature=chosen(fields.temperature, defaults.temperature),
        top_p=chosen(fields.top_p, defaults.top_p),
        top_k=max(0, int(chosen(fields.top_k, defaults.top_k))),
        stop=tuple(fields.stop),
        seed=_seed(fields.seed),
        stop_ids=tuple(fields.stop_token_ids),
        min_tokens=fields.min_tokens,
        ignore_end=fields.ignore_eos,
        logprobs=_logprobs(fields),
    )


def _seed(given: int | None) -> int:
    """An engine's seed, of 32 bits; of the client's 64 all take part."""
    if given is None:
        return secrets.randbelow(_SEEDS)
    if 0 <= given < _SEEDS:
        return given
    return int(np.random.SeedSequence(given % 2**64).generate_state(1)[0])


def _logprobs(fields: Fields) -> int | None:
    if isinstance(fields, ChatFields):
        return fields.top_logprobs if fields.logprobs else None
    return fields.logprobs if isinstance(fields, CompletionFields) else None
