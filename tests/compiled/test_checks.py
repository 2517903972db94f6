"""Each check of compiled programs on a text that fails it, and on one that does not."""

from collections.abc import Callable, Iterator

import pytest

from llava_mini_jax.cost.compiled import MemoryUse, Reading, read_text
from tests.compiled import checks


def reading(*lines: str, temporaries: int = 0, other: str = "") -> Reading:
    """Of a program with these instructions in its ENTRY."""
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m\n\n{other}ENTRY %main (x: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    memory = MemoryUse(arguments=10 * 2**30, temporaries=temporaries, outputs=0, code=0)
    return read_text(text, memory)


X = "%x = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)"
PRODUCT = (
    "%y = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
)
FLOPS = 2 * 4096**3


def scores(dtype: str, sizes: str) -> Reading:
    return reading(X, f"ROOT %s = {dtype}[{sizes}]{{3,2,1,0}} broadcast(%x), dimensions={{0,1}}")


def gathers(count: int) -> Reading:
    gathered = [
        f"%g.{i} = bf16[32000,4096]{{1,0}} all-gather(%x), dimensions={{1}}" for i in range(count)
    ]
    return reading("%x = bf16[32000,64]{1,0} parameter(0)", *gathered)


def reduced(kind: str, sizes: str) -> Reading:
    return reading(
        f"%x = bf16[{sizes}]{{1,0}} parameter(0)",
        f"ROOT %r = bf16[{sizes}]{{1,0}} {kind}(%x), to_apply=%add",
    )


WINDOWED = (
    "%windowed_dot_general_body.1 (p: f32[1]) -> f32[1] {\n  ROOT %p = f32[1] parameter(0)\n}\n\n"
)
PERMUTED = "ROOT %p = bf16[4096,4096]{1,0} collective-permute(%x), source_target_pairs={{0,1}}"
LAYER = 2 * 4096 * 4096
KERNEL = (
    "%k = (bf16[1,8,128,64]{3,2,1,0}) custom-call(%q, %q, %q),"
    ' custom_call_target="__cudnn$fmhaSoftmax"'
)
Q = "%q = bf16[1,128,8,64]{3,2,1,0} parameter(0)"
T, S = 512, 1088

# The check on a program that fails it, on one that passes, and what the first one is told.
CASES: dict[str, tuple[Callable[[Reading], Iterator[str]], Reading, Reading, str]] = {
    "scores": (
        lambda r: checks.written_scores(r, [(T, S)]),
        scores("f32", "8,32,512,1088"),
        scores("bf16", "8,32,512,1088"),
        "f32[8,32,512,1088] (0.57 GB) of scores is written to memory",
    ),
    "scores of a group of heads": (
        lambda r: checks.written_scores(r, [(T, S)]),
        scores("f32", "2,32,2048,1088"),
        scores("f32", "2,32,500,1088"),
        "f32[2,32,2048,1088]",
    ),
    "few scores are nothing": (
        lambda r: checks.written_scores(r, [(T, S)]),
        scores("f32", "1,32,1024,1088"),
        scores("f32", "1,8,512,1088"),
        "of scores is written",
    ),
    "no kernel": (
        lambda r: checks.unfused(r, "cudnn"),
        reading(X, PRODUCT),
        reading(Q, KERNEL),
        "attention is nowhere to be seen, not cudnn",
    ),
    "temporaries": (
        lambda r: checks.temporaries_beside_cache(r, 2**30),
        reading(X, temporaries=2**27),
        reading(X, temporaries=2**25),
        "temporaries are 12.5% of the cache's 1.07 GB",
    ),
    "a copy of a cache": (
        lambda r: checks.copies_of_cache(r, LAYER),
        reading(X, "ROOT %c = bf16[4096,4096]{0,1:T(8,128)(2,1)} copy(%x)"),
        reading(X, "ROOT %c = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} copy(%x)"),
        "copy bf16[4096,4096] moves a cache at every call",
    ),
    "a transpose of a cache in a fusion": (
        lambda r: checks.copies_of_cache(r, LAYER),
        reading(
            X,
            "ROOT %f = bf16[4096,4096]{1,0} fusion(%x), kind=kLoop, calls=%t",
            other="%t (p: bf16[4096,4096]) -> bf16[4096,4096] {\n"
            "  %p = bf16[4096,4096]{1,0} parameter(0)\n"
            "  ROOT %r = bf16[4096,4096]{1,0} transpose(%p), dimensions={1,0}\n}\n\n",
        ),
        reading(X, PRODUCT),
        "fusion bf16[4096,4096] moves a cache",
    ),
    "the head": (
        lambda r: checks.gathered_heads(r, 32000 * 4096, 2),
        gathers(5),
        gathers(4),
        "the head is gathered 5 times in 2 micro-batches",
    ),
    "windowed products": (
        checks.windowed_products,
        reading(X, other=WINDOWED),
        reading(X),
        "windowed einsums: windowed_dot_general_body.1",
    ),
    "weights sent around": (
        checks.windowed_products,
        reading(X, PERMUTED),
        reading(X, PRODUCT),
        "1 collective-permutes",
    ),
    "gradients": (
        lambda r: checks.reduced_whole(r, 2**24),
        reduced("all-reduce", "4096,4096"),
        reduced("all-reduce", "4096,8"),
        "100% of the links' bytes are gradients not scattered: 1 x bf16[4096,4096]",
    ),
    "gradients that are scattered": (
        lambda r: checks.reduced_whole(r, 2**24),
        reduced("all-reduce", "8192,4096"),
        reduced("reduce-scatter", "8192,4096"),
        "bf16[8192,4096]",
    ),
    "too many products": (
        lambda r: checks.too_many_products(r, FLOPS),
        reading(X, PRODUCT, PRODUCT.replace("%y", "%z")),
        reading(X, PRODUCT),
        "products are 2.00 of the model's: expected 1 to 1.3",
    ),
    "too few products": (
        lambda r: checks.too_many_products(r, FLOPS),
        reading(X),
        reading(X, PRODUCT),
        "products are 0.00 of the model's",
    ),
    "an estimate that is too low": (
        lambda r: checks.wrong_estimate(r, 10 * 2**30),
        reading(X, temporaries=2 * 2**30),
        reading(X, temporaries=2**30),
        "--dry-run says 10.00 GiB, 0.83 of the compiler's 12.00: expected 0.9 to 1.35",
    ),
    "an estimate that is too high": (
        lambda r: checks.wrong_estimate(r, 14 * 2**30),
        reading(X),
        reading(X, temporaries=2**30),
        "--dry-run says 14.00 GiB, 1.40 of",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_fails_on_what_it_is_for_and_on_nothing_else(name: str) -> None:
    check, bad, good, told = CASES[name]
    assert any(told in complaint for complaint in check(bad)), list(check(bad))
    assert list(check(good)) == []
