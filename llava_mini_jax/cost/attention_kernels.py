"""Attention in a compiled program: fused kernels by name and by their operands, XLA's own by scope.

cuDNN    custom call "__cudnn$fmha...", "...Backward"; queries [B, T, N, H] first
splash   custom call that is named "splash_mha_fwd", "_dkv", "_dq"; queries [B, N, T, H]
XLA      products and softmax of ops/attention.py, by the name of its einsum or its scope
"""

import dataclasses
import math
import re

from llava_mini_jax.cost.hlo import Instruction
from llava_mini_jax.cost.hlo_work import Work

# Matrix products of queries by keys by width that a pass computes, recomputed scores included.
_PRODUCTS = {"fwd": 2, "bwd": 5, "dkv": 4, "dq": 3}
_XLA = re.compile(r"shard_map|\battention\b|BKR")  # inside `sharding.local`, or its einsums


@dataclasses.dataclass(frozen=True)
class Kernel:
    implementation: str  # "cudnn" or "splash"
    passes: str  # of _PRODUCTS
    flops: float  # of one run; what causality hides is not computed, so not counted


def kernel_of(work: Work) -> Kernel | None:
    """The fused attention kernel that an instruction is, if it is one."""
    if "$fmha" in work.target:
        passes = "bwd" if "Backward" in work.target else "fwd"
        B, T, N, H = work.inputs[0].sizes
        S = work.inputs[1].sizes[1]
        heads = B * N
        causal = '"mask_type": "CAUSAL"' in work.instruction.attributes.replace('":"', '": "')
        return _kernel("cudnn", passes, (heads, T, S, H), causal)
    named = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", work.instruction.name)
    if not work.target or named is None:
        return None
    # Behind what says which blocks are seen, in integers; one row has no axis of its own.
    floats = [a.sizes for a in work.inputs if a.dtype in ("bf16", "f32") and len(a.sizes) > 2]
    (*rows, T, H), (*_, S, _) = floats[:2]
    # Numbers in s32: ids of segments of queries and of keys, and, of a causal mask, of queries.
    causal = sum(a.dtype == "s32" and a.numbers > 1 for a in work.inputs) % 2 == 1
    return _kernel("splash", named[1], (math.prod(rows), T, S, H), causal)


def _kernel(name: str, passes: str, sizes: tuple[int, ...], causal: bool) -> Kernel:
    heads, T, S, H = sizes
    # The last query sees all keys: so text stands behind an image's, and a sequence behind nothing.
    seen = (S - (T - 1) / 2) / S if causal and T <= S else 1.0
    return Kernel(name, passes, 2.0 * _PRODUCTS[passes] * heads * T * S * H * seen)


def is_xla_attention(instruction: Instruction) -> bool:
    """Whether it is a part of attention as XLA compiles it: scores, softmax, what is around."""
    return bool(_XLA.search(instruction.scope))


def has_xla_scores(instruction: Instruction) -> bool:
    return "->BKRS" in instruction.scope
