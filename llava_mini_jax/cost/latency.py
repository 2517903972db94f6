"""Time to a first token, and of every token after it, of several models in turn.

    models, one request (text, images) --warm up--> nothing compiles any more
        repeat: A, B, C, A, B, C, ... --> seconds to the first token, seconds a decoded token

The models take turns, so that a machine that gets slower or busier does so for all of them. Counted
is everything from pixels and token ids on the host to the first token's id on the host; reading and
resizing of images and tokenising are not.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import Example, fused_places, positions
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, engine, seeing_programs, warm_up
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import Model, compiled_programs
from llava_mini_jax.inference.seeing import sizes_up_to
from llava_mini_jax.inference.ticket import Piece
from llava_mini_jax.models import compressors, llava_mini
from llava_mini_jax.models.compressors.signature import INSTEAD
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.weights.quantize import form_of, quantize

WARM_UPS = 2
CHUNK = 8  # images of a request that are looked at together
MARK = -200


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model whose time is measured."""

    params: LlavaMini  # layers unrolled
    cfg: LlavaMiniConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What every model is asked. Raises InputError for numbers below 1."""

    text: int  # tokens beside the images
    images: int  # or frames of a video
    parts: int  # of an image, 1 without high resolution
    new_tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds, one entry a repetition."""

    first: tuple[float, ...]  # to the first token
    token: tuple[float, ...]  # a token after it, averaged over the answer


Runner = Callable[[], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Spread:
    median: float
    low: float  # the tenth percentile
    high: float  # the ninetieth


def spread(values: tuple[float, ...]) -> Spread:
    low, median, high = np.percentile(values, (10, 50, 90))
    return Spread(float(median), float(low), float(high))


def random_candidates(
    cfgs: Mapping[str, LlavaMiniConfig], dtype: Any, seed: int = 0
) -> dict[str, Candidate]:
    """Models with random weights. What two of them have in common is held once.

    The configurations must differ in compressor and number of pre-fusion layers only.
    """
    # Of them all one that has a projector, and most pre-fusion.
    deepest = max(cfgs.values(), key=lambda cfg: (cfg.compress != INSTEAD, cfg.prefusion_layers))
    key = jax.random.key(seed)
    whole = param_tree.init(key, llava_mini.unrolled(llava_mini.spec(deepest)), dtype)
    found = {}
    for name, cfg in cfgs.items():
        own = param_tree.init(key, compressors.spec(cfg.compressor), dtype)
        fusion = None
        if whole.prefusion is not None and cfg.prefusion_layers:
            layers = whole.prefusion.layers[: cfg.prefusion_layers]
            fusion = dataclasses.replace(whole.prefusion, layers=layers)
        projector = None if cfg.compress == INSTEAD else whole.projector
        parts = dict(projector=projector, compressor=own, prefusion=fusion)
        found[name] = Candidate(dataclasses.replace(whole, **parts), cfg)
    return found


def rounded(models: Mapping[str, Candidate], narrow: str) -> dict[str, Candidate]:
    """The same models with int8 or int4 weights of products, which are shared as those are."""
    made: dict[int, Any] = {}

    def leaf(path: str, spec: param_tree.ParamSpec, weight: jax.Array) -> Any:
        form = form_of(path, spec, spec.output_axes, narrow)
        if form is None:
            return weight
        if id(weight) not in made:
            # A copy, because rounding gives its argument away.
            made[id(weight)] = quantize(jnp.copy(weight), spec.output_axes, form)
        return made[id(weight)]

    def one(model: Candidate) -> Candidate:
        spec = llava_mini.unrolled(llava_mini.spec(model.cfg))
        return Candidate(param_tree.map_paths(leaf, spec, model.params), model.cfg)

    return {name: one(model) for name, model in models.items()}


def measure(models: Mapping[str, Candidate], request: Request, repeats: int) -> dict[str, Times]:
    """Times of every model, measured `in_turns`.

    Raises InputError where a model has too few positions for the request.
    """
    found = in_turns({name: runner(model, request) for name, model in models.items()}, repeats)
    return {name: Times(*each) for name, each in found.items()}


def in_turns(
    runs: Mapping[str, Runner],
    repeats: int,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """What each run gives, transposed: a tuple of repetitions for each of its figures.

    After `WARM_UPS` rounds that do not count, and in which everything is compiled. `watch` hears
    between two runs how many are done, and of how many.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; give 1 or more")
    total = (WARM_UPS + repeats) * len(runs)
    for number in range(WARM_UPS):
        for place, run in enumerate(runs.values(), 1):
            run()
            watch(number * len(runs) + place, total)
    programs, found = compiled_programs(), {name: [] for name in runs}
    for number in range(WARM_UPS, WARM_UPS + repeats):
        for place, (name, run) in enumerate(runs.items(), 1):
            found[name].append(run())
            watch(number * len(runs) + place, total)
    assert compiled_programs() == programs, "something was compiled while times were measured"
    return {name: tuple(zip(*each, strict=True)) for name, each in found.items()}


def timed(run: Callable[[], Any]) -> Runner:
    """A run whose one figure is its milliseconds."""

    def once() -> tuple[float]:
        began = time.perf_counter()
        run()
        return (1e3 * (time.perf_counter() - began),)

    return once


def runner(model: Candidate, request: Request) -> Runner:
    """Milliseconds to the first token, and of each after it."""
    return Answering(model, make_example(model.cfg, request), request.new_tokens)


Call = Callable[..., Any]  # of a program and its arguments: runs it, or compiles it alone


def _run(program: Callable[..., Any], *arguments: Any) -> Any:
    return program(*arguments)


def askable(model: Candidate, parts: int = 1, lengths: Sequence[int] = ()) -> Model:
    """A model without a folder, with the digits world's tokenizer: most of its ids say nothing.

    Images have `parts` parts, texts are padded to the next of `lengths`.
    """
    images = configs.image_config("release", model.cfg.vision, grid=max(1, math.isqrt(parts - 1)))
    bundle = configs.Bundle(
        model=model.cfg,
        images=images,
        prompt=configs.prompt_config("release", "vicuna_v1", model.cfg.llm.max_positions),
        eos_ids=(),
        pad_id=0,
    )
    buckets = bounds.buckets_for(bundle)
    buckets = dataclasses.replace(buckets, lengths=tuple(lengths) or buckets.lengths)
    return Model(model.params, bundle, build_tokenizer(), buckets)


class Answering:
    """A Runner of one example: milliseconds to the first token, and of each after it, as an engine
    with one slot answers it.

    The slot holds the next of `lengths`, or just the prompt, and `room` new tokens, or just those:
    what examples have in common there is compiled once. Raises InputError where the model has too
    few positions.
    """

    def __init__(
        self,
        model: Candidate,
        example: Example,
        new_tokens: int,
        lengths: Sequence[int] = (),
        room: int | None = None,
    ):
        cfg, places = model.cfg, places_of(model, example)
        if places + new_tokens + 1 > cfg.llm.max_positions:
            raise InputError(
                f"{places} positions and {new_tokens} new tokens are more than the model's"
                f" {cfg.llm.max_positions}; ask with fewer images, text or tokens"
            )
        padded = next((length for length in lengths if length >= places), places)
        length = min(padded + (room or new_tokens) + 1, cfg.llm.max_positions)
        self._lane, self._new_tokens = LaneSize(1, length), new_tokens
        lengths = lengths or (len(example.ids),)
        self._model = askable(model, example.pixels.shape[1], lengths)
        # The first one, and as many behind it.
        settings = Settings(max_new_tokens=new_tokens + 1, ignore_end=True)
        self._asked = engine.Request(example, engine.media_of(example), settings)

    def compile(self, call: Call) -> None:
        """Gives `call` the programs of a run (inference/warm_up.py)."""
        example, length = self._asked.example, self._lane.length
        sizes = {"text": len(example.ids), "media": example.frames, "length": length}
        warm_up.of_request(self._model, call, **sizes, chunk=CHUNK)

    def __call__(self) -> tuple[float, float]:
        # Another one each time: it remembers nothing.
        asking = engine.Engine(self._model, [self._lane], timed=False, chunk=CHUNK)
        told: list[float] = []

        def hear(news: Piece | Exception) -> None:
            if isinstance(news, Exception):
                raise news
            told.append(time.perf_counter())

        began = time.perf_counter()
        asking.submit(self._asked, hear)
        # The call behind the prompt has one token: CPUs run small programs while they are called,
        # and the first token would wait for all of them.
        asking.call_steps = 1
        while asking.step():
            asking.call_steps = bounds.STEPS if told else 1
        return 1e3 * (told[0] - began), 1e3 * (told[-1] - told[0]) / self._new_tokens


def places_of(model: Candidate, example: Example) -> int:
    """Positions of the language model that an example takes."""
    parts = example.pixels.shape[1]
    return positions(example, model.cfg.tokens_per_image(parts))


class Seeing:
    """A Runner of one example: milliseconds of the tower for its images, and of all that follows
    up to the language model: projector, compressor and pre-fusion."""

    def __init__(self, model: Candidate, example: Example):
        self._model = model
        self._chunks = [
            _chunk(example.pixels[start : start + CHUNK])
            for start in range(0, len(example.pixels), CHUNK)
        ]
        self._ids_BT = np.maximum(example.ids, 0)[None]
        self._fuse_BF = fused_places([example.fuse], self._ids_BT.shape[1])

    def compile(self, call: Call) -> None:
        """Gives `call` the programs of a run (inference/warm_up.py)."""
        self._fuse(self._text(call), self._look(call), call)

    def __call__(self) -> tuple[float, float]:
        text_BFD = jax.block_until_ready(self._text())
        began = time.perf_counter()
        seen = jax.block_until_ready(self._look())
        looked = time.perf_counter()
        jax.block_until_ready(self._fuse(text_BFD, seen))
        return 1e3 * (looked - began), 1e3 * (time.perf_counter() - looked)

    def _text(self, call: Call = _run) -> Any:
        params, cfg = self._model.params, self._model.cfg
        return call(seeing_programs.embed_text, params, self._ids_BT, self._fuse_BF, cfg)[1]

    def _look(self, call: Call = _run) -> list[Any]:
        params, cfg = self._model.params, self._model.cfg
        return [
            call(seeing_programs.encode_vision, params, pixels, cfg) for pixels, _ in self._chunks
        ]

    def _fuse(self, text_BFD: Any, seen: Sequence[Any], call: Call = _run) -> list[Any]:
        params, cfg = self._model.params, self._model.cfg
        total_FD, tokens = jnp.zeros(text_BFD.shape[1:], jnp.float32), []
        for features_IJPE, (_, count) in zip(seen, self._chunks, strict=True):
            visual, memory = call(seeing_programs.prefuse_images, params, features_IJPE, cfg)
            tokens.append(visual)
            if memory is not None:
                given = (total_FD, memory, count, text_BFD, cfg)
                total_FD = call(seeing_programs.prefuse_text, params, *given)
        return [*tokens, total_FD]


def _chunk(pixels_IJYXC: np.ndarray) -> tuple[np.ndarray, np.int32]:
    """Images as a chunk of one of few sizes, padded with the first one; how many they are."""
    count = len(pixels_IJYXC)
    size = next(size for size in sizes_up_to(CHUNK) if size >= count)
    padding = pixels_IJYXC[:1].repeat(size - count, axis=0)
    return np.concatenate([pixels_IJYXC, padding]), np.int32(count)


def make_example(cfg: LlavaMiniConfig, request: Request, seed: int = 0) -> Example:
    """A request of random pixels and ids, with its images in the middle of the text."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, cfg.llm.vocab_size, request.text + 1).astype(np.int32)
    ids[request.text // 2] = MARK
    side = cfg.vision.image_size
    pixels = rng.integers(0, 256, (request.images, request.parts, side, side, 3), np.uint8)
    labels = np.full(len(ids), IGNORE, np.int32)
    asked = np.zeros(min(cfg.declared.question, request.text), np.int32)
    questions = (asked,) if cfg.declared.question else ()
    return Example(ids, ids >= 0, labels, pixels, (request.images,), questions=questions)
