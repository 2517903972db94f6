"""Programs compiled by threads before they are called: while weights are read, or many at once.

    of_question, of_requests --call, as the real ones are--> traced --threads--> compiled
                                                                          '--wait

JAX keeps what it has compiled for arrays of these shapes, and the real call finds it. What goes
wrong here is told by the real call, which then compiles for itself.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.compilation import threads_pay
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import Example, power_of_two
from llava_mini_jax.inference import (
    blocks,
    bounds,
    engine,
    generate,
    lanes,
    seeing,
    session_programs,
    slots,
)
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.opening import Opened
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import cache as kv
from llava_mini_jax.models.llava_mini import LlavaMini


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

    def wait(self) -> None:
        """Until all are compiled, or have failed."""
        if self._planned is not None:
            wait([self._planned])
            wait(self._compiled)
        self._pool.shutdown()


def of_question(
    opened: Opened,
    call: Callable[..., Any],
    *,
    text: int,
    media: Sequence[int],
    answer: int,
    chunk: int,
) -> None:
    """A session's first question: `text` ids about media of so many frames, in chunks of `chunk`,
    and an answer of `answer` tokens at most."""
    bundle, params = opened.bundle, opened.shapes()
    cfg, T = bundle.model, opened.buckets.length(text)
    ids_BT = fuse_BF = _shape(np.int32, 1, T)
    text_BTD, text_BFD = call(generate.embed_text, params, ids_BT, fuse_BF, cfg)
    sizes = {min(chunk, power_of_two(left)) for n in media for left in range(n, 0, -chunk)}
    for size in sizes or [1] * bundle.prompt.blank_image:
        side = (bundle.images.parts, bundle.images.size, bundle.images.size, 3)
        pixels = _shape(np.uint8, size, *side)
        features = call(session_programs.encode_vision, params, pixels, cfg)
        _, memory = call(session_programs.prefuse_images, params, features, cfg)
        if memory is not None:
            total_FD, count = _shape(np.float32, T, cfg.llm.width), _shape(np.int32)
            call(session_programs.prefuse_text, params, total_FD, memory, count, text_BFD, cfg)
    prompt = text - len(media) + sum(media) * bounds.tokens_per_image(bundle)
    room = power_of_two(min(answer, cfg.llm.max_positions - prompt))
    slots, blocks = session_programs.sizes(prompt, room)
    cache = jax.eval_shape(
        lambda: kv.empty(cfg.llm.layers, 1, slots, cfg.llm.kv_heads, cfg.llm.head_width, cfg.dtype)
    )
    logits_BV: Any = None
    for size in dict.fromkeys(blocks):
        visual_BSD = _shape(text_BTD.dtype, 1, size, cfg.llm.width)
        arguments = (text_BTD, visual_BSD, _shape(np.int32, 1, size), *[_shape(np.int32)] * 2, cfg)
        logits_BV, cache = call(session_programs.prefill_block, params, cache, *arguments)
    state = jax.eval_shape(
        partial(generate.begun, room=room), cache, logits_BV, _shape(np.int32, 1)
    )
    _answer(params, bundle, call, state, 1)


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
    of_engine(model, call, lanes, texts=sorted(texts), steps=bounds.STEPS, films=False)


def of_engine(
    model: Loaded,
    call: Callable[..., Any],
    sizes: Sequence[lanes.LaneSize],
    *,
    texts: Sequence[int],
    steps: int,
    films: bool = True,
) -> None:
    """Everything that an engine calls, for texts of these buckets."""
    blocks = _lanes(model, call, sizes, steps)
    features = _frames(model, call)
    cfg, params = model.bundle.model, model.params
    for T in texts:
        ids_BT = fuse_BF = _shape(np.int32, 1, T)
        text_BTD, text_BFD = call(generate.embed_text, params, ids_BT, fuse_BF, cfg)
        for size in seeing.sizes(T):
            _, memory = features[size]
            if memory is None:
                continue
            call(session_programs.prefuse_texts, params, memory, (text_BFD,) * size, cfg)
            total_FD = _shape(np.float32, *text_BFD.shape[1:])
            if films:
                arguments = (total_FD, memory, _shape(np.int32), text_BFD, cfg)
                call(session_programs.prefuse_text, params, *arguments)
        if params.prefusion is not None:
            call(session_programs.add, total_FD, total_FD)
            call(session_programs.mean_text, total_FD, _shape(np.int32), text_BTD, fuse_BF)
        for S in blocks:
            visual_SD = _shape(text_BTD.dtype, S, cfg.llm.width)
            call(session_programs.splice_block, text_BTD, visual_SD, _shape(np.int32, S))


def _frames(model: Loaded, call: Callable[..., Any]) -> dict[int, Any]:
    """(features, pre-fusion's keys and values) of chunks of each size."""
    images, cfg = model.bundle.images, model.bundle.model
    found = {}
    for size in seeing.SIZES:
        pixels = _shape(np.uint8, size, images.parts, images.size, images.size, 3)
        features = call(session_programs.encode_vision, model.params, pixels, cfg)
        _, memory = call(session_programs.prefuse_images, model.params, features, cfg)
        found[size] = features, memory
        if memory is not None and size > 1:
            number = _shape(np.int32)
            call(session_programs.join, (found[1][1],) * size)
            call(session_programs.one_of, memory, number, axis=1)
            call(session_programs.one_of, features, number, axis=0)
    if model.bundle.prompt.blank_image:
        pixels = _shape(np.float32, 1, images.parts, images.size, images.size, 3)
        call(session_programs.encode_vision, model.params, pixels, cfg)
    return found


def _lanes(
    model: Loaded, call: Callable[..., Any], sizes: Sequence[lanes.LaneSize], steps: int
) -> list[int]:
    """The programs of all lanes; returns the sizes of blocks that prompts are read in."""
    cfg, params, found = model.bundle.model, model.params, set()
    states = []
    for size in sorted(sizes, key=lambda size: size.length):
        state = jax.eval_shape(lambda size=size: slots.empty(size.slots, size.length, cfg))
        sampling, told_B = make_sampling(size.slots, 0.0, 1.0, 0, 0, ()), np.zeros(size.slots, bool)

        def x(S: int) -> Any:
            return _shape(cfg.dtype, S, cfg.llm.width)

        fresh = blocks.fresh_sizes(size.length)
        for S in fresh:
            for R in blocks.FRESH_ROWS:
                if R > 1 and size.slots == 1:
                    continue
                places_R = [_shape(np.int32, R)] * 2
                arguments = (state, (x(S),) * R, *places_R, _shape(bool, R), sampling, told_B, cfg)
                call(slots.read_fresh, params, *arguments)
        later = blocks.block_sizes(size.length)
        for S in later:
            numbers = [_shape(np.int32)] * 3
            arguments = (state, x(S), *numbers, _shape(bool), sampling, told_B, cfg)
            call(slots.read_block, params, *arguments)
        number = _shape(np.int32)
        arguments = (state, sampling, told_B, told_B, number, number, cfg, steps)
        call(slots.decode, params, *arguments)
        if states:
            call(slots.move, states[-1], state, number, number)
        states.append(state)
        found |= {*fresh, *later}
    return sorted(found)


def _answer(params: LlavaMini, bundle: Bundle, call: Callable[..., Any], state: Any, rows: int):
    sampling = make_sampling(rows, 0.0, 1.0, 0, 0, ())
    state = call(generate.decode, params, state, sampling, np.int32(1), bundle.model)
    token_B = call(generate.upcoming, state.logits_BV, sampling, state.step)
    call(generate.told, state.tokens_BN, token_B, state.step)


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
