"""Requests a second of mixed requests: the engine, and the same in batches one after another.

    mixed requests --engine: who is done leaves, who waits enters-------> requests a second
                   --batches of the same programs, each to its last end-> the same

Three of four requests have an image; questions and answers are of many lengths. No token ends an
answer, so that the work is known beforehand.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.inference import bounds, engine
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.ticket import Piece

WORDS = [
    "what",
    "which",
    "number",
    "digit",
    "is",
    "are",
    "on",
    "the",
    "left",
    "right",
    "of",
    "this",
    "page",
    "and",
    "why",
    "how",
    "many",
]


@dataclass(frozen=True)
class Speed:
    """Seconds of each way, of several measurements in turns; and whether the tokens were equal."""

    engine: list[float]
    batches: list[float]
    equal: int  # requests whose tokens were the same both ways
    requests: int
    tokens: int  # of all answers


def mixed(
    model: Model, count: int, longest: int, seed: int = 0
) -> tuple[list[Example], list[Settings]]:
    """Requests that are the same for the same seed; answers have 4 to `longest` tokens."""
    random = np.random.default_rng(seed)
    side = model.bundle.images.size
    examples, settings = [], []
    for number in range(count):
        question = " ".join(random.choice(WORDS, random.integers(2, 20)))
        picture = random.integers(0, 256, (side, side, 3), np.uint8) if number % 4 else None
        examples.append(model.request(question, model.read_pictures(picture, None)))
        tokens = int(random.integers(4, longest + 1))
        settings.append(Settings(max_new_tokens=tokens, ignore_end=True))
    return examples, settings


def measure(
    model: Model,
    examples: Sequence[Example],
    settings: Sequence[Settings],
    slots: int,
    repeats: int,
) -> Speed:
    """Both ways, in turns, behind a first time that compiles."""
    sizes = [bounds.prompt_positions(example, model.bundle) for example in examples]
    order = sorted(range(len(examples)), key=sizes.__getitem__)
    together = [order]
    batches = [order[start : start + slots] for start in range(0, len(order), slots)]

    def run(groups: Sequence[Sequence[int]]) -> tuple[float, dict[int, list[int]]]:
        heard: dict[int, list[int]] = {number: [] for number in order}
        began = time.perf_counter()
        for group in groups:
            for _ in _answered(model, group, examples, settings, slots, heard):
                pass
        return time.perf_counter() - began, heard

    _, ours = run(together)
    _, theirs = run(batches)
    seconds: dict[str, list[float]] = {"engine": [], "batches": []}
    for _ in range(repeats):
        seconds["engine"].append(run(together)[0])
        seconds["batches"].append(run(batches)[0])
    equal = sum(ours[number] == theirs[number] for number in order)
    return Speed(**seconds, equal=equal, requests=len(order), tokens=sum(map(len, ours.values())))


def _answered(
    model: Model,
    group: Sequence[int],
    examples: Sequence[Example],
    settings: Sequence[Settings],
    slots: int,
    heard: dict[int, list[int]],
) -> Iterator[None]:
    def hear(place: int, piece: Piece) -> None:
        heard[group[place]] += piece.ids

    chosen: tuple[list[Example], list[Settings]] = ([], [])
    for number in group:
        chosen[0].append(examples[number])
        chosen[1].append(settings[number])
    return engine.answering(model, *chosen, slots, hear)


def lines(speed: Speed, slots: int, best: Callable[[Sequence[float]], float] = min) -> list[str]:
    """What people read: the best measurement of each way."""
    ours, theirs = best(speed.engine), best(speed.batches)
    return [
        f"{speed.requests} requests, {speed.tokens} tokens, {slots} slots; tokens equal in"
        f" {speed.equal} of {speed.requests}",
        f"  engine   {speed.requests / ours:8.2f} requests/s {speed.tokens / ours:9.1f} tokens/s",
        f"  batches  {speed.requests / theirs:8.2f} requests/s"
        f" {speed.tokens / theirs:9.1f} tokens/s",
        f"  engine / batches: {theirs / ours:.2f}",
    ]
