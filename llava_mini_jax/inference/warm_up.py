"""Programs compiled by threads before they are called: while weights are read, or many at once.

    of_question, of_requests --call, as the real ones are--> traced --threads--> compiled
                                                                          '--wait

JAX keeps what it has compiled for arrays of these shapes, and the real call finds it. What goes
wrong here is told by the real call, which then compiles for itself.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.compilation import threads_pay
from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.inference import (
    blocks,
    bounds,
    engine,
    lane,
    places,
    reading,
    seeing,
    seeing_programs,
    slots,
)
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import cache

Whole = tuple[int, bool]  # positions of a prompt that is read at once; whether an image is shown


class WarmUp:
    """Compiles what `plan` calls; `plan` is given a `call(program, *arguments)` that only traces.

    Arguments are arrays or their shapes; what a call returns are shapes.
    """

    def __init__(self, plan: Callable[[Callable[..., Any]], None], *, always: bool = False):
        """`always`: also where threads do not pay; then all is compiled before the first call."""
        # On GPUs one at a time: XLA measures kernels while it compiles.
        count = 1 if jax.default_backend() == "gpu" else os.cpu_count()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="compile")
        self._compiled: list[Future] = []
        self._planned = self._pool.submit(plan, self._call) if always or threads_pay() else None

    def _call(self, program: Any, *arguments: Any, **named: Any) -> Any:
        traced = program.trace(*arguments, **named)
        self._compiled.append(self._pool.submit(lambda: traced.lower().compile()))
        return traced.out_info

    def wait(self, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Until all are compiled, or have failed; `watch` hears how many are, and of how many."""
        if self._planned is not None:
            wait([self._planned])
            for number, _ in enumerate(as_completed(self._compiled), 1):
                watch(number, len(self._compiled))
        self._pool.shutdown()


def of_question(
    model: Loaded,
    call: Callable[..., Any],
    *,
    text: int,
    media: Sequence[int],
    answer: int,
    chunk: int,
    more: bool = False,
) -> None:
    """A session's first question: `text` ids about media of so many frames, in chunks of `chunk`,
    and an answer of `answer` tokens at most. `more`: others will follow it.

    The parameters of `model` may be shapes.
    """
    prompt = text - len(media) + sum(media) * bounds.tokens_per_image(model.bundle)
    answer = min(answer, model.bundle.model.llm.max_positions - prompt)
    # Media first: where they stand changes little.
    is_visual_S = np.arange(prompt) < prompt - (text - len(media))
    taken = places.needed_by(is_visual_S, model.bundle)
    length = bounds.slot_length(taken, answer, model.bundle)
    of_request(model, call, text=text, media=media, length=length, chunk=chunk, more=more)


def of_request(
    model: Loaded,
    call: Callable[..., Any],
    *,
    text: int,
    media: Sequence[int],
    length: int,
    chunk: int,
    more: bool = False,
) -> None:
    """One request alone, to an engine with one slot of `length` positions, as `of_question`."""
    prompt = text - len(media) + sum(media) * bounds.tokens_per_image(model.bundle)
    texts = _text(model, call, model.buckets.length(max(1, text)))
    shown = media or [1] * model.bundle.prompt.blank_image
    sizes = {
        next(size for size in seeing.sizes_up_to(chunk) if size >= min(chunk, left))
        for frames in shown
        for left in range(frames, 0, -chunk)
    }
    pixels = np.uint8 if media else np.float32  # a blank image is normalised
    memories = {size: _look(model, call, size, pixels)[1] for size in sorted(sizes)}
    _fuse(model, call, texts, memories, shown, chunk)
    fresh, *later = blocks.sizes_of(prompt, length)
    later = blocks.block_sizes(length) if more else sorted(set(later))
    at_first, whole = [fresh], list[Whole]()
    if cache.chooses(model.bundle.model):
        at_first, later, whole = [], [], [(prompt, bool(media))]
    elif model.bundle.model.declared.keeps is not None:
        at_first, later = [], _pieces(model, length)
    size = lane.LaneSize(1, length)
    chosen = _lane(model, call, size, at_first, later, whole, bounds.STEPS)[1]
    for S in sorted({*at_first, *later, *chosen}):
        _splice(model, call, texts[0], S)


def _fuse(
    model: Loaded,
    call: Callable[..., Any],
    texts: tuple[Any, Any, Any],
    memories: dict[int, Any],
    media: Sequence[int],
    chunk: int,
) -> None:
    """A text's way through pre-fusion with media of so many frames."""
    if model.params.prefusion is None or not media:
        return
    (text_BTD, text_BFD, fuse_BF), cfg = texts, model.bundle.model
    total_FD, number = _shape(np.float32, *text_BFD.shape[1:]), _shape(np.int32)
    if 1 in media:
        call(seeing_programs.prefuse_texts, model.params, memories[1], (text_BFD,), cfg)
        if len(media) > 1:
            call(seeing_programs.add, total_FD, total_FD)
    in_films = {
        next(size for size in memories if size >= min(chunk, left))
        for frames in media
        if frames > 1
        for left in range(frames, 0, -chunk)
    }
    for size in sorted(in_films):
        arguments = (total_FD, memories[size], number, text_BFD, cfg)
        call(seeing_programs.prefuse_text, model.params, *arguments)
    call(seeing_programs.mean_text, total_FD, number, text_BTD, fuse_BF)


def of_requests(
    model: Loaded,
    call: Callable[..., Any],
    examples: Sequence[Example],
    settings: Settings,
    batch_size: int,
) -> None:
    """`model.answer_requests`."""
    texts = {model.buckets.length(max(1, len(example.ids))) for example in examples}
    lanes = engine.lanes_of(model, examples, [settings] * len(examples), batch_size)
    of_engine(
        model,
        call,
        lanes,
        texts=sorted(texts),
        steps=bounds.STEPS,
        films=False,
        whole=[
            (bounds.prompt_positions(example, model.bundle), bool(example.frames))
            for example in examples
        ],
    )


def of_engine(
    model: Loaded,
    call: Callable[..., Any],
    sizes: Sequence[lane.LaneSize],
    *,
    texts: Sequence[int],
    steps: int,
    films: bool = True,
    whole: Sequence[Whole] | None = None,
) -> None:
    """Everything that an engine calls, for texts of these buckets.

    `whole`: the prompts that come, of a model that reads them whole; None: any text of the buckets,
    alone or with one image. What else comes is compiled when it is read.
    """
    if whole is None:
        picture = bounds.tokens_per_image(model.bundle)
        lengths = range(1, max(texts) + 1)
        whole = [(shown * picture + text, bool(shown)) for shown in (0, 1) for text in lengths]
    blocks = _lanes(model, call, sizes, whole, steps)
    features = _frames(model, call)
    cfg, params = model.bundle.model, model.params
    for T in texts:
        text_BTD, text_BFD, fuse_BF = _text(model, call, T)
        for size in seeing.sizes(T, model.bundle.model):
            _, memory = features[size]
            if memory is None:
                continue
            call(seeing_programs.prefuse_texts, params, memory, (text_BFD,) * size, cfg)
            total_FD = _shape(np.float32, *text_BFD.shape[1:])
            if films:
                arguments = (total_FD, memory, _shape(np.int32), text_BFD, cfg)
                call(seeing_programs.prefuse_text, params, *arguments)
        if params.prefusion is not None:
            call(seeing_programs.add, total_FD, total_FD)
            call(seeing_programs.mean_text, total_FD, _shape(np.int32), text_BTD, fuse_BF)
        for S in blocks:
            _splice(model, call, text_BTD, S)


def _text(model: Loaded, call: Callable[..., Any], T: int) -> tuple[Any, Any, Any]:
    """(embeddings, what of them is fused, its places) of a text of that bucket."""
    ids_BT = fuse_BF = _shape(np.int32, 1, T)
    texts = call(seeing_programs.embed_text, model.params, ids_BT, fuse_BF, model.bundle.model)
    return *texts, fuse_BF


def _splice(model: Loaded, call: Callable[..., Any], text_BTD: Any, S: int) -> None:
    visual_SD = _shape(text_BTD.dtype, S, model.bundle.model.llm.width)
    call(blocks.splice_block, text_BTD, visual_SD, _shape(np.int32, S))


def _look(
    model: Loaded, call: Callable[..., Any], size: int, dtype: Any = np.uint8
) -> tuple[Any, Any]:
    """(features, pre-fusion's keys and values) of a chunk."""
    images, cfg = model.bundle.images, model.bundle.model
    pixels = _shape(dtype, size, images.parts, images.size, images.size, 3)
    features = call(seeing_programs.encode_vision, model.params, pixels, cfg)
    if most := cfg.declared.question:
        features = replace(features, question_IT=_shape(np.int32, size, most))
    return features, call(seeing_programs.prefuse_images, model.params, features, cfg)[1]


def _frames(model: Loaded, call: Callable[..., Any]) -> dict[int, Any]:
    """`_look` of chunks of each size."""
    found = {}
    for size in seeing.sizes(0, model.bundle.model):
        features, memory = found[size] = _look(model, call, size)
        if memory is not None and size > 1:
            number = _shape(np.int32)
            call(seeing_programs.join, (found[1][1],) * size)
            call(seeing_programs.one_of, memory, number, axis=1)
            call(seeing_programs.one_of, features, number, axis=0)
    if model.bundle.prompt.blank_image:
        _look(model, call, 1, np.float32)
    return found


def _lanes(
    model: Loaded,
    call: Callable[..., Any],
    sizes: Sequence[lane.LaneSize],
    whole: Sequence[Whole],
    steps: int,
) -> list[int]:
    """The programs of all lanes; returns the sizes of blocks that prompts are read in."""
    states, found = [], set()
    for size in sorted(sizes, key=lambda size: size.length):
        fresh, later = blocks.fresh_sizes(size.length), blocks.block_sizes(size.length)
        if model.bundle.model.declared.keeps is not None:
            fresh, later = (), _pieces(model, size.length)
        state, chosen = _lane(model, call, size, fresh, later, whole, steps)
        if states:
            number = _shape(np.int32)
            call(slots.move, states[-1], state, number, number)
        states.append(state)
        found |= {*fresh, *later, *chosen}
    return sorted(found)


def _lane(
    model: Loaded,
    call: Callable[..., Any],
    size: lane.LaneSize,
    fresh: Sequence[int],
    later: Sequence[int],
    whole: Sequence[Whole],
    steps: int,
) -> tuple[Any, set[int]]:
    """One lane's programs, for blocks of these sizes, and for prompts that are read whole where
    later layers choose; returns its state, and the sizes that such prompts are read in."""
    cfg, params = model.bundle.model, model.params
    state = call(slots.empty, size.slots, size.length, cfg)
    sampling, told_B = make_sampling(size.slots, 0.0, 1.0, 0, 0, ()), np.zeros(size.slots, bool)
    number = _shape(np.int32)
    for S in fresh:
        x_SD = _shape(cfg.dtype, S, cfg.llm.width)
        for R in blocks.FRESH_ROWS if size.slots > 1 else (1,):
            places_R = [_shape(np.int32, R)] * 2
            arguments = (state, (x_SD,) * R, *places_R, _shape(bool, R), sampling, told_B, cfg)
            call(reading.read_fresh, params, *arguments)
    for S in later:
        x_SD = _shape(cfg.dtype, S, cfg.llm.width)
        rest = (_shape(bool), sampling, told_B, cfg)
        if cfg.declared.keeps is None:
            call(reading.read_block, params, state, x_SD, *[number] * 3, *rest)
        else:
            piece = reading.Piece(*[number] * 4)
            call(reading.read_piece, params, state, x_SD, piece, number, *rest)
    chosen = {
        blocks.chosen_size(count, shown, size.length, cfg)
        for count, shown in whole
        if cache.chooses(cfg) and count < size.length - (0 if shown else cache.spare(cfg))
    }
    for S, stay in sorted(chosen):
        x_SD, place_S = _shape(cfg.dtype, S, cfg.llm.width), _shape(np.int32, S)
        rest = (sampling, told_B, cfg, stay)
        call(reading.read_chosen, params, state, x_SD, place_S, number, number, *rest)
    call(slots.decode, params, state, sampling, told_B, told_B, number, number, cfg, steps)
    return state, {S for S, _ in chosen}


def _pieces(model: Loaded, length: int) -> list[int]:
    """Sizes of the pieces that prompts are read in where images leave the cache.

    None where later layers choose: prompts are read whole, in sizes of their own.
    """
    if cache.chooses(model.bundle.model):
        return []
    picture = blocks.piece_size(bounds.tokens_per_image(model.bundle))
    return sorted({*blocks.block_sizes(length), picture})


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
