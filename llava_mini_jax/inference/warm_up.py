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
from llava_mini_jax.inference import batch_decode, generate, session_programs
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.opening import Opened
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import cache as kv
from llava_mini_jax.models.llava_mini import LlavaMini


class WarmUp:
    """Compiles what `plan` calls; `plan` is given a `call(program, *arguments)` that only traces.

    Arguments are arrays or their shapes; what a call returns are shapes.
    """

    def __init__(self, plan: Callable[[Callable[..., Any]], None]):
        # On GPUs one at a time: XLA measures kernels while it compiles.
        count = 1 if jax.default_backend() == "gpu" else os.cpu_count()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="compile")
        self._compiled: list[Future] = []
        self._planned = self._pool.submit(plan, self._call) if threads_pay() else None

    def _call(self, program: Any, *arguments: Any) -> Any:
        traced = program.trace(*arguments)
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
    prompt = text - len(media) + sum(media) * batch_decode.tokens_per_image(bundle)
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
    model: Model,
    call: Callable[..., Any],
    examples: Sequence[Example],
    settings: Settings,
    batch_size: int,
) -> None:
    """`model.answer_requests`."""
    bundle, settings = model.bundle, model.with_stop_text(settings)
    for numbers in batch_decode.batches(examples, bundle, batch_size):
        rows = [examples[number] for number in numbers]
        texts = batch_decode.empty_texts(rows, bundle, model.tokenizer, model.stop_ids, settings)
        rows += batch_decode.padding_rows(rows)
        state = generate.encode_and_prefill(
            model.params,
            bundle.model,
            rows,
            model.buckets,
            batch_decode.longest_prompt(bundle),
            bundle.prompt.padding_side,
            batch_decode.room(texts),
            call,
        )
        _answer(model.params, bundle, call, state, len(rows))


def _answer(params: LlavaMini, bundle: Bundle, call: Callable[..., Any], state: Any, rows: int):
    sampling = make_sampling(rows, 0.0, 1.0, 0, 0, ())
    state = call(generate.decode, params, state, sampling, np.int32(1), bundle.model)
    token_B = call(generate.upcoming, state.logits_BV, sampling, state.step)
    call(generate.told, state.tokens_BN, token_B, state.step)


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
