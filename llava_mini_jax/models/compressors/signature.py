"""The signature of all compressors: what each method's file holds.

    Config                 frozen; a CompressorConfig
    declare(cfg)           Declaration: where it sits, what it reads, what its tokens depend on
    tokens(cfg, side)      how many tokens a map of side x side patches becomes, at most; where
                           requests choose, of one that says nothing
    spec(cfg)              its parameters, or None
    apply(params, seen, cfg) -> Compressed
    run(params, llm, x, placed, cfg, how) -> x    of a method inside the language model: its layers
    pieces(pictures, cfg) -> Pieces               of one that keeps less in the cache than it reads

The package's __init__ alone knows all methods; models/llava_mini.py composes by the declaration.
"""

import dataclasses
from typing import NamedTuple

from flax import struct

from llava_mini_jax.models.decoder import LlamaConfig
from llava_mini_jax.models.seen import PATCHES, Reads, Seen
from llava_mini_jax.params import Leaf

# Where a compressor may sit: it reads the tower's features, and the projector its tokens; or it
# reads what the projector gives; or it is the projector.
FEATURES, PROJECTED, INSTEAD = "features", "projected", "instead"
PLACES = (FEATURES, PROJECTED, INSTEAD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorConfig:
    kind: str


class Taken(NamedTuple):
    """Which of an image's tokens stand in a request's sequence."""

    first: int
    count: int
    made: int  # tokens that the compressor gives of an image

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many tokens a request may ask for. The compressor gives those of all counts, and each
    request takes its own: which, the host plans, so one program serves them all."""

    made: int
    starts: tuple[tuple[int, int], ...]  # (a count, the first of its tokens), the smallest first

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(count for count, _ in self.starts)

    def taken(self, count: int) -> Taken:
        return Taken(dict(self.starts)[count], count, self.made)


def check_counts(kind: str, counts: tuple[int, ...], count: int, most: int) -> None:
    """ValueError unless `counts`, if there are any, grow from 1 to `most` and have `count`."""
    growing = list(counts) == sorted({*counts}) and all(1 <= n <= most for n in counts)
    if counts and not (growing and count in counts):
        raise ValueError(
            f"{kind}: counts are {counts} and count is {count}; give numbers that grow, from 1 to"
            f" {most}, and one of them as count"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a method, as it is configured, needs and is."""

    places: tuple[str, ...]  # of PLACES; the first is its authors'
    reads: Reads = PATCHES
    adaptive: bool = False  # an image may have fewer tokens than `tokens` says
    choice: Choice | None = None  # where requests choose how many tokens they take
    pooled: bool = False  # an image's tokens depend on the other images of a call
    parts: bool = False  # defined on the map of a high-resolution image's parts, too
    videos: bool = False  # defined on frames, too
    compresses: bool = True  # else every patch is a token
    inside: bool = False  # it goes on in the language model, whose layers its `run` runs
    behind: int = 0  # layers of the language model, which has more, that run before it acts
    # (K, n): in front of its layer K all but n of an image's positions leave the sequence
    drops: tuple[int, int] | None = None
    # (K, n): of a method inside, once a prompt is read n of an image's positions stay in the cache
    # of layer K and those behind; None: it has no cache
    keeps: tuple[int, int] | None = None
    vocabulary: int = 0  # tokens that the language model must know
    question: int = 0  # ids of the question that it reads, at most
    question_vocabulary: int = 0  # and how many of them there are
    # Of what it reads of the tower and gives to the language model, where its parameters fix them.
    widths: tuple[int, int] | None = None

    @property
    def reusable(self) -> bool:
        """Whether another question may use an image's tokens: they were made without reading it.

        Keys and values of a method that chooses by the prompt are another matter
        (models/cache.py).
        """
        return not self.reads.question


@struct.dataclass
class Compressed:
    tokens_IQE: Leaf  # in the width of what was read, or in the LLM's if it is the projector
    valid_IQ: Leaf = None  # bool: which of them are there; None: all of them
    attention_IQP: Leaf = None  # each token's weights of the patches, averaged over heads


@struct.dataclass
class Placed:
    """What stands in each position of the language model's sequence."""

    valid_BS: Leaf  # bool: something does
    visual_BS: Leaf  # bool: an image's token
    place_BS: Leaf  # int32: which of its image's tokens, from 0
    patches: int = struct.field(pytree_node=False)  # of an image, which stand first


class Piece(NamedTuple):
    """Positions of a prompt that are read together, and of which the last `kept` stay."""

    first: int
    end: int
    kept: int


@dataclasses.dataclass(frozen=True)
class How:
    """How a method inside the language model runs its layers."""

    llm: LlamaConfig
    remat: str
    attention: str


def side_of(seen: Seen) -> int:
    """Patches along one side of the square map."""
    patches = seen.patches_IPE.shape[1]
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches do not form a square grid")
    return side
