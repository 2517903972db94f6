"""Frames a second of the video pipeline, stage by stage, beside the release's loop over frames.

    llava-mini profile video [MODEL] [--video FILE] [--chunk N]

    file --decode--> frames --preprocess--> pixels --vision--> features --read, fuse--> fused text
                                               |        a chunk of frames a call
                                               '--one frame a call: tower, compressor, projector,
                                                  pre-fusion over [patches | compressed | text]

The loop is the release's algorithm in this framework (frames one by one, each with the whole text
through all of pre-fusion), compiled, and operation by operation as the release runs it. All take
turns within a repetition, so that a machine that gets busier does so for all, and all must give the
same fused text. Without MODEL: random weights, an eighth of LLaMA-3.1-8B's and CLIP's widths.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle
from llava_mini_jax.cost.latency import random_candidates
from llava_mini_jax.data.media.video import FrameSampling, preprocess_frames, read_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import seeing_programs
from llava_mini_jax.inference.request import ONE_A_SECOND, resize_of
from llava_mini_jax.models import llava_mini, prefusion
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import Array

READING = ("decode", "preprocess")
CHUNKED: tuple[str, ...] = ("vision", "compressor and pre-fusion")
LOOP, EAGER = "the release's loop", "the same, not compiled"
FOLLOW_UP = "a follow-up question"
TOLERANCE = 2e-4  # of fused text, float32, relative to its largest value


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds a frame, one entry a repetition, by stage (CHUNKED, LOOP, EAGER, FOLLOW_UP)."""

    seconds: dict[str, tuple[float, ...]]

    def median(self, *stages: str) -> float:
        return float(np.median(self._sum(stages)))

    def ratio(self, loop: str, *stages: str) -> float:
        """How many times as fast as `loop` these stages are: the median over repetitions."""
        return float(np.median(self._sum((loop,)) / self._sum(stages)))

    def _sum(self, stages: Sequence[str]) -> np.ndarray:
        return np.sum([self.seconds[name] for name in stages], axis=0)


def read_frames(video: str, bundle: Bundle, count: int) -> tuple[np.ndarray, dict[str, float]]:
    """(pixels [F, J, Y, X, C] of at most `count` frames, seconds a frame of decoding and resizing).

    One frame a second; resized as a session does it.
    """
    began = time.perf_counter()
    frames = list(itertools.islice(read_video(video, ONE_A_SECOND), count))
    decoded = time.perf_counter()
    resize = resize_of(video, FrameSampling(fps=1.0))
    pixels = preprocess_frames(frames, bundle.images, resize=resize)
    end = time.perf_counter()
    seconds = ((decoded - began) / len(frames), (end - decoded) / len(frames))
    return pixels, dict(zip(READING, seconds, strict=True))


def one_frame(
    params: LlavaMini, pixels_JYXC: Array, text_TD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(visual tokens [Q, D], fused text [T, D]) of a frame: the whole sequence in all layers."""
    assert params.prefusion is not None
    patches_ISD, compressed_IQD = llava_mini.encode_and_compress(params, pixels_JYXC[None], cfg)
    image_ISD, Q = patches_ISD, compressed_IQD.shape[1]
    if cfg.fuse_compressed and cfg.declared.compresses:
        image_ISD = jnp.concatenate([patches_ISD, compressed_IQD], axis=1)
    size = image_ISD.shape[1]
    fuse_IT = jnp.ones((1, len(text_TD)), bool)
    out_ISD, _, _ = prefusion.apply_whole(
        params.prefusion, image_ISD, text_TD[None], fuse_IT, cfg.llm
    )
    tokens_QD = out_ISD[0, size - Q : size] if cfg.fuse_compressed else compressed_IQD[0]
    return tokens_QD, out_ISD[0, size:]


_compiled = jax.jit(one_frame, static_argnames="cfg")


def measure(
    params: LlavaMini,
    cfg: LlavaMiniConfig,
    pixels_FJYXC: np.ndarray,
    *,
    text: int,
    chunk: int,
    repeats: int,
) -> Speed:
    """The speed of chunks and of the loop on frames that are already read; `cfg` has pre-fusion.

    Raises InputError for a model without pre-fusion, and for fewer frames than a chunk.
    """
    if params.prefusion is None:
        raise InputError("a model without pre-fusion has no loop to compare with; give another one")
    if min(text, chunk, repeats) < 1 or len(pixels_FJYXC) < chunk:
        raise InputError(
            f"{len(pixels_FJYXC)} frames in chunks of {chunk}, {text} tokens of text, {repeats} "
            "repetitions: give at least 1 of each, and as many frames as a chunk has"
        )
    frames = len(pixels_FJYXC) // chunk * chunk
    text_TD = np.random.default_rng(0).standard_normal((text, cfg.llm.width))
    run = _Run(params, cfg, pixels_FJYXC[:frames], chunk, jnp.asarray(text_TD, cfg.dtype))
    ways = {LOOP: run.loop, EAGER: partial(run.loop, one_frame)}
    expected = run.chunks()  # compiles, as the others do
    for name, way in ways.items():
        far = float(jnp.abs(way() - expected).max() / jnp.abs(expected).max())
        assert far < TOLERANCE or cfg.dtype != jnp.float32, f"{name}: off by {far}"
    ways[FOLLOW_UP] = run.follow_up
    found: dict[str, list[float]] = {name: [] for name in (*CHUNKED, *ways)}
    for _ in range(repeats):
        run.seconds[:] = 0
        run.chunks()
        for name, seconds in zip(CHUNKED, run.seconds, strict=True):
            found[name].append(float(seconds) / frames)
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            found[name].append((time.perf_counter() - began) / frames)
    return Speed({name: tuple(seconds) for name, seconds in found.items()})


class _Run:
    """One video and one text, by both ways; each waits for its results."""

    def __init__(
        self, params: LlavaMini, cfg: LlavaMiniConfig, pixels: np.ndarray, size: int, text_TD: Array
    ):
        self.params, self.cfg, self.pixels, self.size = params, cfg, pixels, size
        self.text_TD, self.seconds = text_TD, np.zeros(len(CHUNKED))
        self.memories: list[Any] = []

    def chunks(self) -> Array:
        total_TD, self.memories = self._nothing(), []
        for start in range(0, len(self.pixels), self.size):
            part, began = self.pixels[start : start + self.size], time.perf_counter()
            features = seeing_programs.encode_vision(self.params, part, self.cfg)
            jax.block_until_ready(features)
            seen = time.perf_counter()
            _, memory = seeing_programs.prefuse_images(self.params, features, self.cfg)
            self.memories.append(memory)
            total_TD = jax.block_until_ready(self._fuse(total_TD, memory))
            self.seconds += (seen - began, time.perf_counter() - seen)
        return total_TD / len(self.pixels)

    def follow_up(self) -> Array:
        return jax.block_until_ready(functools.reduce(self._fuse, self.memories, self._nothing()))

    def loop(self, step: Callable = _compiled) -> Array:
        total_TD = self._nothing()
        for frame in self.pixels:
            _, fused_TD = step(self.params, frame, self.text_TD, self.cfg)
            total_TD = total_TD + fused_TD.astype(jnp.float32)
        return jax.block_until_ready(total_TD / len(self.pixels))

    def _nothing(self) -> Array:
        return jnp.zeros(self.text_TD.shape, jnp.float32)

    def _fuse(self, total_TD: Array, memory: Any) -> Array:
        return seeing_programs.prefuse_text(
            self.params, total_TD, memory, np.int32(self.size), self.text_TD[None], self.cfg
        )


def lines(reading: dict[str, float], speed: Speed) -> Iterator[str]:
    """The table for people."""
    yield f"{'':<28}{'ms a frame':>12}{'frames/s':>12}"
    rows = dict(reading) | {name: speed.median(name) for name in CHUNKED}
    rows["the model, both"] = speed.median(*CHUNKED)
    rows |= {name: speed.median(name) for name in (FOLLOW_UP, LOOP, EAGER)}
    for name, seconds in rows.items():
        yield f"{name:<28}{1e3 * seconds:>12.3f}{1 / seconds:>12.1f}"
    for loop in (LOOP, EAGER):
        yield (
            f"times as fast as {loop}: {speed.ratio(loop, *CHUNKED):.2f},"
            f" a follow-up question {speed.ratio(loop, FOLLOW_UP):.1f}"
        )


def small(text: int) -> tuple[LlavaMini, Bundle]:
    """Random weights in a real model's proportions: an eighth of the widths, six tower layers."""
    vision = dataclasses.replace(
        configs.CLIP_L_336, image_size=168, width=128, mlp_width=512, layers=7, heads=4
    )
    llm = dataclasses.replace(
        configs.LLAMA_3_1_8B,
        vocab_size=1024, width=512, mlp_width=1792, layers=1, heads=8, kv_heads=2, head_width=64,
    )  # fmt: skip
    cfg = configs.build(llm, vision, "release", compute_dtype="float32")
    found = random_candidates({"small": cfg}, jnp.float32)["small"]
    bundle = Bundle(
        model=cfg,
        images=configs.image_config("release", vision),
        prompt=configs.prompt_config("release", "llama_3_1", text + 1),
        eos_ids=(),
        pad_id=0,
    )
    return found.params, bundle
