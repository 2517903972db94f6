"""Visual-token compressors, a method a file, behind one signature (signature.py).

    cfg.kind --METHODS--> the method's module
                            |-- declare: where it sits, what it reads of the tower
                            |-- spec, apply: Seen --> Compressed
                            '-- run, of a method inside the language model

How to add one: docs/architecture.md, "Compressors".
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.models.compressors import (
    average_pool,
    fastv,
    llama_vid,
    m3,
    mqt,
    multi_head,
    nested,
    none,
    prumerge,
    prumerge_plus,
    similarity,
    token_packer,
    visionzip,
    voco,
)
from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.signature import (
    Choice,
    Compressed,
    CompressorConfig,
    Declaration,
    How,
    Piece,
    Placed,
    Taken,
)
from llava_mini_jax.models.seen import Seen

__all__ = [
    "METHODS",
    "Choice",
    "Compressed",
    "CompressorConfig",
    "Declaration",
    "GridConfig",
    "How",
    "Piece",
    "Placed",
    "Taken",
    "apply",
    "config_of",
    "declare",
    "method",
    "pieces",
    "read",
    "run",
    "spec",
    "tokens",
    "with_tokens",
]

# The modules of all methods, by the name that configs and folders give them.
METHODS: dict[str, Any] = {
    "none": none,
    "average_pool": average_pool,
    "similarity": similarity,
    "multi_head": multi_head,
    "nested": nested,
    "m3": m3,
    "mqt": mqt,
    "token_packer": token_packer,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "visionzip": visionzip,
    "llama_vid": llama_vid,
    "voco": voco,
    "fastv": fastv,
}


def method(cfg: CompressorConfig) -> Any:
    """The module of a configuration's method."""
    return _known(cfg.kind, type(cfg))


def config_of(kind: str) -> type[CompressorConfig]:
    """The class of a method's configuration; ValueError for a method that is unknown."""
    return _known(kind).Config


def _known(kind: str, config: type | None = None) -> Any:
    if kind not in METHODS:
        raise ValueError(f'compressor "{kind}" is unknown; use one of {", ".join(METHODS)}')
    found = METHODS[kind]
    if config is not None and config is not found.Config:
        raise ValueError(
            f'compressor "{kind}" is configured by {found.Config.__name__}, not by'
            f" {config.__name__}: give its own fields"
        )
    return found


def declare(cfg: CompressorConfig) -> Declaration:
    """Where the method sits, what it reads, and what its tokens depend on."""
    return method(cfg).declare(cfg)


def tokens(cfg: CompressorConfig, side: int) -> int:
    """Tokens of a map of `side` x `side` patches; of an adaptive method the most there can be."""
    return method(cfg).tokens(cfg, side)


def spec(cfg: CompressorConfig) -> Any:
    return method(cfg).spec(cfg)


def apply(params: Any, seen: Seen, cfg: CompressorConfig) -> Compressed:
    """The tokens of I images; `seen` has what the method declares."""
    with jax.named_scope("compressor"):
        return method(cfg).apply(params, seen, cfg)


def with_tokens(
    params: Any, llm: Any, tokens_IQD: jax.Array, patches: int, cfg: CompressorConfig
) -> jax.Array:
    """Images' tokens, with those that a method inside the language model puts behind patches."""
    own = method(cfg)
    if not hasattr(own, "with_tokens"):
        return tokens_IQD
    I, Q = tokens_IQD.shape[:2]
    placed = Placed(
        valid_BS=jnp.ones((I, Q), bool),
        visual_BS=jnp.ones((I, Q), bool),
        place_BS=jnp.broadcast_to(jnp.arange(Q), (I, Q)),
        patches=patches,
    )
    return own.with_tokens(params, llm, tokens_IQD, placed, cfg)


def pieces(pictures: Sequence[tuple[int, int]], cfg: CompressorConfig) -> list[Piece]:
    """What of a prompt is read together, and stays in the cache only in part; `pictures` are at
    positions (first, end)."""
    own = method(cfg)
    return own.pieces(pictures, cfg) if hasattr(own, "pieces") else []


def read(
    llm: Any, x_BSD: jax.Array, placed: Placed, stay: int, cfg: CompressorConfig, how: How
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """A prompt as a method reads it that chooses what stays in later layers' caches."""
    with jax.named_scope("llm"):
        return method(cfg).read(llm, x_BSD, placed, stay, cfg, how)


def run(
    params: Any, llm: Any, x_BSD: jax.Array, placed: Placed, cfg: CompressorConfig, how: How
) -> jax.Array:
    """The language model's layers over whole sequences, as a method inside of it runs them."""
    with jax.named_scope("llm"):
        return method(cfg).run(params, llm, x_BSD, placed, cfg, how)
