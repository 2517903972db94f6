"""The signature of all compressors: what each method's file holds.

    Config                 frozen; a CompressorConfig
    declare(cfg)           Declaration: where it sits, what it reads, what its tokens depend on
    tokens(cfg, side)      how many tokens a map of side x side patches becomes, at most
    spec(cfg)              its parameters, or None
    apply(params, seen, cfg) -> Compressed
    run(params, llm, x, placed, cfg, how) -> x    of a method inside the language model: its layers

The package's __init__ alone knows all methods; models/llava_mini.py composes by the declaration.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a method, as it is configured, needs and is."""

    places: tuple[str, ...]  # of PLACES; the first is its authors'
    reads: Reads = PATCHES
    adaptive: bool = False  # a picture may have fewer tokens than `tokens` says
    pooled: bool = False  # a picture's tokens depend on the other pictures of a call
    parts: bool = False  # defined on the map of a high-resolution picture's parts, too
    videos: bool = False  # defined on frames, too
    compresses: bool = True  # else every patch is a token
    inside: bool = False  # it goes on in the language model, whose layers its `run` runs
    # (K, n): in front of its layer K all but n of a picture's positions leave the sequence
    drops: tuple[int, int] | None = None
    vocabulary: int = 0  # tokens that the language model must know
    question: int = 0  # ids of the question that it reads, at most
    question_vocabulary: int = 0  # and how many of them there are
    # Of what it reads of the tower and gives to the language model, where its parameters fix them.
    widths: tuple[int, int] | None = None


@struct.dataclass
class Compressed:
    tokens_IQE: Leaf  # in the width of what was read, or in the LLM's if it is the projector
    valid_IQ: Leaf = None  # bool: which of them are there; None: all of them
    attention_IQP: Leaf = None  # each token's weights of the patches, averaged over heads


@struct.dataclass
class Placed:
    """What stands in each position of the language model's sequence."""

    valid_BS: Leaf  # bool: something does
    visual_BS: Leaf  # bool: a picture's token
    place_BS: Leaf  # int32: which of its picture's tokens, from 0
    patches: int = struct.field(pytree_node=False)  # of a picture, which stand first


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
        raise ValueError(f"{patches} patches are no square grid")
    return side
