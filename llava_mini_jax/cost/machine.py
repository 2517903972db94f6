"""What this machine can do at most: bytes read a second, and products a second, measured.

    an array of 256 MiB --maximum, in a compiled program--> GB/s
    two square matrices --product in the dtype of computing--> GFLOP/s
    parameters --> the bytes that a decoded token reads of them

A decoded token of one row reads every weight once and computes next to nothing, so its time over
that of a plain read says what is left to gain; the time to a first token is held to the products.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.models.llava_mini import LlavaMini

READ = 2**28  # bytes: no cache holds them
SIDE = 2048  # of the matrices


def reader() -> tuple[Callable[[], Any], float]:
    """(reads memory when it is called, how many bytes)."""
    numbers = jnp.zeros(READ // 4, jnp.float32)
    read = jax.jit(jnp.max)
    return lambda: read(numbers).block_until_ready(), READ


def multiplier(dtype: str) -> tuple[Callable[[], Any], float]:
    """(multiplies two matrices when it is called, how many FLOPs)."""
    matrix = jnp.ones((SIDE, SIDE), dtype)
    # Rows with rows: how weights are multiplied here, output features first.
    multiply = jax.jit(lambda a, b: jnp.einsum("RI,OI->RO", a, b))
    return lambda: multiply(matrix, matrix).block_until_ready(), 2.0 * SIDE**3


def token_bytes(params: LlavaMini) -> int:
    """Bytes of the weights that one decoded token reads: the language model's layers and head."""
    llm = params.llm
    head = llm.embed_tokens if llm.lm_head is None else llm.lm_head
    return sum(leaf.nbytes for leaf in jax.tree.leaves((llm.layers, llm.final_norm, head)))
