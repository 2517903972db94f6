"""What a request takes with LLaVA-1.5's tokens in front of the same language model.

    Request --its own images and question--> LLaVA-Mini, LLaVA-1.5, LLaVA-Mini, ...
                                               each on the engine's thread, between two steps
                                                   '--> positions, milliseconds

Nobody trained the weights for that side: what it costs is true, what it would say is not.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, TypeVar

import numpy as np

from llava_mini_jax.cost import latency
from llava_mini_jax.cost.baseline import llava_1_5, shared_params
from llava_mini_jax.cost.latency import Answering, Candidate, Runner, Seeing
from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.recompute import refuse_inside, refuse_question
from llava_mini_jax.inference.ticket import Request
from llava_mini_jax.inference.vision_tokens import with_unasked
from llava_mini_jax.inference.warm_up import WarmUp
from llava_mini_jax.inference.worker import Worker
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.serving.errors import ApiError

T = TypeVar("T")

REPEATS = 3
MOST_TOKENS = 64  # of an answer: a token's time is known long before
STEP = 64  # prompts are padded to its multiples, on both sides
MOST_FRAMES = 32  # a chunk of frames is one call, in which nobody else is answered
BUSY_SECONDS = 10

_alone = threading.Lock()  # comparisons come one after the other, or they would measure each other


def comparable(cfg: LlavaMiniConfig) -> bool:
    """Whether there is something to compare: LLaVA-1.5 itself has no other side."""
    return cfg.compresses


def compare(worker: Worker, request: Request) -> dict[str, Any]:
    """Positions and median milliseconds of both sides, measured in turns after a warm-up.

    Raises ApiError for requests without an image or beyond what LLaVA-1.5 could read, and while
    another comparison is running.
    """
    try:
        sides, example = _sides(worker, request)
    except InputError as error:
        raise ApiError(400, str(error)) from error
    tokens = min(request.settings.max_new_tokens, MOST_TOKENS)
    if not _alone.acquire(blocking=False):
        raise ApiError(429, "another comparison is being measured", retry_after=BUSY_SECONDS)
    try:
        runs = _runs(worker, sides, example, tokens)
        times = latency.in_turns(runs, REPEATS)
    except InputError as error:
        raise ApiError(400, str(error)) from error
    finally:
        _alone.release()
    return {
        "tokens": tokens,
        "repeats": REPEATS,
        **{name: _told(model, example, times, name) for name, model in sides.items()},
    }


def _sides(worker: Worker, request: Request) -> tuple[dict[str, Candidate], Example]:
    model, frames = worker.model, sum(medium.frames for medium in request.media)
    cfg = model.bundle.model
    refuse_inside(cfg)
    refuse_question(cfg)
    if cfg.declared.adaptive:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" gives images different numbers of tokens, which'
            " the comparison cannot show; give it a fixed ratio"
        )
    if not comparable(cfg):
        raise InputError("the model is a LLaVA-1.5 itself, so there is nothing to compare")
    if not frames:
        raise InputError("the request shows no image; give one, because text costs both the same")
    if frames > MOST_FRAMES:
        raise InputError(f"{frames} frames are too many to measure; give at most {MOST_FRAMES}")
    each = cfg.patches_per_image(model.bundle.images.parts)
    needed, most = frames * each, cfg.llm.max_positions
    if needed + len(request.example.ids) + MOST_TOKENS > most:
        raise InputError(
            f"LLaVA-1.5 would need {needed} positions for {frames} frames of {each} patches, and"
            f" the model has {most} for everything; give fewer frames"
        )
    sides = {
        # With the tokens that the request takes; LLaVA-1.5 takes all.
        "mini": Candidate(model.params, with_unasked(model.bundle, request.example.tokens).model),
        "baseline": Candidate(shared_params(model.params), llava_1_5(cfg)),
    }
    pixels_IJYXC = np.stack([frame for medium in request.media for frame in medium.read()])
    return sides, dataclasses.replace(request.example, pixels=pixels_IJYXC, tokens=None)


def _runs(
    worker: Worker, sides: dict[str, Candidate], example: Example, tokens: int
) -> dict[str, Runner]:
    """Two runs a side: what its images take, and its first and later tokens."""
    found: dict[str, Answering | Seeing] = {}
    for name, model in sides.items():
        longest = model.cfg.llm.max_positions - 1
        lengths = (*range(STEP, longest, STEP), longest)
        found[f"{name} sees"] = Seeing(model, example)
        found[f"{name} answers"] = Answering(model, example, tokens, lengths, MOST_TOKENS)
    # Here, so that nobody's answer stands still while programs are compiled.
    for run in found.values():
        WarmUp(run.compile, always=True).wait()
    return {name: partial(on_engine, worker, run) for name, run in found.items()}


def on_engine(worker: Worker, work: Callable[[], T]) -> T:
    """What `work` gives between two steps of the engine, on its thread."""
    try:
        return worker.between(work).result()
    except CancelledError as error:
        raise ApiError(503, "the engine has stopped working") from error


def _told(model: Candidate, example: Example, times: Any, name: str) -> dict[str, Any]:
    vision, fusion = times[f"{name} sees"]
    first, token = times[f"{name} answers"]
    fuses = model.params.prefusion is not None
    return {
        "image_tokens": len(example.pixels) * model.cfg.tokens_per_image(example.pixels.shape[1]),
        "positions": latency.places_of(model, example),
        "vision_ms": float(np.median(vision)),
        "prefusion_ms": float(np.median(fusion)) if fuses else None,
        "first_token_ms": float(np.median(first)),
        "token_ms": float(np.median(token)),
    }
