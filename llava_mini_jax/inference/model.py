"""A model to ask: folder in, answers out.

    load(folder) --> Model: parameters, configuration, tokenizer, buckets
                       |
    prompts, images --request.py--> Examples --engine.py: see, read, decode--> token ids
                                                                                     |
                                 answers, or pieces of one as they arrive <--answer.py

Every size is rounded up to one of few buckets, so that after a first request of each size nothing
is compiled any more (`compiled_programs` counts).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from llava_mini_jax.data.batches.examples import Example, check_fits
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import (
    blocks,
    bounds,
    engine,
    reading,
    recompute,
    request,
    seeing_programs,
    slots,
)
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.opening import Opened, open_folder
from llava_mini_jax.inference.request import Picture, Pictures, Prompt, Video
from llava_mini_jax.inference.ticket import Piece
from llava_mini_jax.inference.vision_tokens import VisionTokens, vision_tokens_of
from llava_mini_jax.weights.import_hf import Watch

PROGRAMS = (
    seeing_programs.embed_text,
    *(seeing_programs.encode_vision, seeing_programs.prefuse_images),
    *(seeing_programs.prefuse_text, seeing_programs.prefuse_texts),
    *(seeing_programs.join, seeing_programs.one_of, seeing_programs.add),
    *(seeing_programs.mean_text, blocks.splice_block),
    *(slots.empty, slots.decode, slots.move),
    *(reading.read_fresh, reading.read_block, reading.read_piece, reading.read_chosen),
    recompute.whole_logits,
)


class Model(Loaded):
    """A loaded model to ask; `load` makes one."""

    @overload
    def generate(self, prompts: str, *args: Any, **settings: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Turn], *args: Any, **settings: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], *args: Any, **settings: Any) -> list[str]: ...
    def generate(
        self,
        prompts: Any,
        images: Any = None,
        videos: Any = None,
        *,
        sampling: FrameSampling | None = None,
        batch_size: int = 8,
        vision_tokens: VisionTokens | Sequence[VisionTokens] = None,
        **settings: Any,
    ) -> str | list[str]:
        """The answer to a prompt, or the answers to a list of prompts.

        `settings` are Settings' fields: max_new_tokens, temperature, top_p, top_k, stop, seed.

        A prompt is text, or a conversation as a list of Turns. `images` and `videos` belong to
        the prompt (see `request.read_pictures` for their types); for a list of prompts, give a list
        with an entry, or None, for each. They replace each "<image>" of the prompt, images first,
        then videos; without any "<image>" they come before the text. `sampling` chooses the frames
        of videos; None is one a second, as the model's dialect samples them.

        `vision_tokens` is the number of tokens for each image, or "all", if the model supports
        several (compressor "nested"). For a list of prompts, a list may give each its own.

        `batch_size` prompts are answered at a time; when one ends, the next takes its place.
        A row's answer does not depend on the other rows. A sampled answer depends on the seed
        and its number in the list, so one prompt given n times has n answers. Warns if the model's
        positions are full before an answer ends. Raises InputError for input that cannot be used.
        """
        chosen = Settings(**settings)
        request.check_kind(
            prompts, Sequence, "prompts", "text, a list of Turns, or a list of these"
        )
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Turn))
        if alone:
            prompts, images, videos = [prompts], [images], [videos]
        answers = self.answers(
            prompts,
            images,
            videos,
            chosen,
            sampling=sampling,
            batch_size=batch_size,
            vision_tokens=vision_tokens,
        )
        for number, answer in enumerate(answers):
            self._warn_if_full(answer, _place(number, len(answers)))
        return answers[0].text if alone else [answer.text for answer in answers]

    def answers(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
        settings: Settings,
        *,
        sampling: FrameSampling | None = None,
        batch_size: int = 8,
        vision_tokens: VisionTokens | Sequence[VisionTokens] = None,
    ) -> list[Answer]:
        """`generate` for a list of prompts, with the answers' token counts and why each ended."""
        examples = []
        each = vision_tokens_of(vision_tokens, len(prompts))
        for number, prompt in enumerate(prompts):
            pictures = self.read_pictures(
                _entry(images, number, len(prompts), "images"),
                _entry(videos, number, len(prompts), "videos"),
                sampling,
            )
            where = _place(number, len(prompts))
            examples.append(self.request(prompt, pictures, where, vision_tokens=each[number]))
        return self.answer_requests(examples, settings, batch_size=batch_size)

    def answer_requests(
        self, examples: Sequence[Example], settings: Settings, *, batch_size: int
    ) -> list[Answer]:
        """The answers to `request`s, in order; `batch_size` of them are answered at a time."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give 1 or more")
        if not examples:
            return []
        own = [replace(settings, seed=seed) for seed in settings.seeds(len(examples))]
        return answer_all(self._answering, self, examples, own, batch_size)

    def stream(
        self,
        prompt: Prompt,
        images: Picture | Sequence[Picture] | None = None,
        videos: Video | Sequence[Video] | None = None,
        *,
        sampling: FrameSampling | None = None,
        vision_tokens: VisionTokens = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The answer to one prompt in pieces as they arrive; together they equal `generate`'s.

        No piece ends within a character or a stop string. Input that cannot be used
        raises InputError at once, before you take the first piece.
        """
        chosen = Settings(**settings)
        chosen.seeds(1)
        pictures = self.read_pictures(images, videos, sampling)
        example = self.request(prompt, pictures, vision_tokens=vision_tokens)
        return self._pieces(example, chosen)

    def _pieces(self, example: Example, settings: Settings) -> Iterator[str]:
        heard: list[Piece] = []

        def hear(_: int, piece: Piece) -> None:
            heard.append(piece)

        steps = bounds.STEPS_STREAMING
        for _ in self._answering(self, [example], [settings], 1, hear, steps=steps):
            yield from (piece.text for piece in heard if piece.text)
            if heard and heard[-1].answer is not None:
                self._warn_if_full(heard[-1].answer, "the prompt")
            heard.clear()

    @property
    def _answering(self) -> Callable[..., Iterator[None]]:
        return engine.answering if self.bundle.model.keeps_cache else recompute.answering

    def read_pictures(
        self, images: Any, videos: Any, sampling: FrameSampling | None = None
    ) -> Pictures:
        """The images and videos of one prompt, read once for any number of requests."""
        return request.read_pictures(images, videos, self.bundle, sampling)

    def request(
        self,
        prompt: Prompt,
        pictures: Pictures,
        where: str = "the prompt",
        *,
        vision_tokens: VisionTokens = None,
    ) -> Example:
        """A checked prompt with its images. Raises InputError if it does not fit the model."""
        example = request.make_request(
            prompt, pictures, self.bundle, self.tokenizer, where, vision_tokens
        )
        tokens = bounds.tokens_per_image(self.bundle)
        check_fits(example, tokens, bounds.longest_prompt(self.bundle), where)
        return example

    def full_context(self, where: str) -> str:
        """The warning for an answer that ends because no positions are left."""
        return (
            f"the answer to {where} ends early: it and the text before it fill all"
            f" {self.bundle.model.llm.max_positions} positions of the model"
        )

    def _warn_if_full(self, answer: Answer, where: str) -> None:
        if answer.finish == "context":
            warnings.warn(self.full_context(where), stacklevel=3)


def answer_all(
    answering: Callable[..., Iterator[None]],
    model: Loaded,
    examples: Sequence[Example],
    settings: Sequence[Settings],
    batch_size: int,
) -> list[Answer]:
    """The answers to all examples, by engine.py's `answering` or one like it."""
    answers: dict[int, Answer] = {}

    def hear(number: int, piece: Piece) -> None:
        if piece.answer is not None:
            answers[number] = piece.answer

    for _ in answering(model, examples, settings, batch_size, hear):
        pass
    return [answers[number] for number in range(len(examples))]


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    attention: str = "auto",
    vision_tower: Path | str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    vision_tokens: VisionTokens = None,
    compressor: str | None = None,
    watch: Watch = lambda done, total: None,
) -> Model:
    """Loads a model from a folder, or by its name on the Hugging Face hub.

    - `dtype` of parameters and products: by default "float32" on CPU and "bfloat16" elsewhere.
      "int8" and "int4" round the weights of products (weights/quantize.py; "int4" keeps the
      codes of an AWQ or GPTQ folder) and compute in the default dtype.
    - `attention`: "auto", "xla", "cudnn" or "splash" (ops/attention.py).
    - `vision_tower`: the folder of the vision tower, if the model does not contain it.
    - `template` of the prompts (a name of TEMPLATES in data/text/conversation.py) and `max_length`
      of prompts in positions: for what the folder's config.json does not say (docs/weights.md).
    - `vision_tokens`: the default number of tokens for an image, if the model supports several.
    - `compressor`: a method that needs no training, for a LLaVA-1.5
      ("visionzip,dominant=54,contextual=10"), or options of the folder's own method.
    - `watch` is called with the bytes of weights read so far, and the total.

    To shard the weights over n devices, load and use the model under
    `jax.set_mesh(make_mesh(tensor=n))`. Raises InputError for anything that is missing, damaged or
    inconsistent.
    """
    return read(
        open_folder(
            folder,
            dtype=dtype,
            attention=attention,
            vision_tower=vision_tower,
            template=template,
            max_length=max_length,
            vision_tokens=vision_tokens,
            compressor=compressor,
        ),
        watch,
    )


def read(opened: Opened, watch: Watch = lambda done, total: None) -> Model:
    """The model of an opened folder, with its weights."""
    return Model(opened.weights(watch), opened.bundle, opened.tokenizer, opened.buckets)


def compiled_programs() -> int:
    """How many programs of generation exist: constant while requests stay within known sizes."""
    return sum(map(methodcaller("_cache_size"), PROGRAMS))


def _place(number: int, count: int) -> str:
    return "the prompt" if count == 1 else f"prompt {number + 1} of {count}"


def _entry(given: Sequence[Any] | None, number: int, count: int, name: str) -> Any:
    if given is None:
        return None
    one = isinstance(given, str | bytes | Path | Image.Image)
    listed = (
        not one
        and isinstance(given, Sequence | np.ndarray)
        and (not isinstance(given, np.ndarray) or given.ndim > 0)
    )
    held = "one file" if one else f"{len(given)} entries" if listed else "no list"
    if not listed or len(given) != count:
        raise InputError(
            f"{name} holds {held} for {count} prompts;"
            " give a list with an entry for each prompt: a list of files, or None"
        )
    return given[number]
