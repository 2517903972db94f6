"""What a compiled program must not do: each check gives the sentences that say what it does.

    Reading (cost/compiled.py) --a check--> [] or complaints

Each has cost time or memory once: docs/results/compiled.md.
"""

from collections.abc import Iterable, Iterator

from llava_mini_jax.cost.compiled import Reading
from llava_mini_jax.terminal import GIB

SCORES = 2**26  # bytes of float32 scores that decoding and short prompts may have
CACHE_SHARE = 0.05  # of the cache's bytes that a call may take beside it
PRODUCTS = 1.3  # times the model's own: recomputation, and what pads
REDUCED = 0.25  # of what goes over links may be gradients that every device gets all of
ESTIMATE = (0.9, 1.35)  # what the compiler plans, in shares of what --dry-run says


def written_scores(reading: Reading, pairs: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Float32 arrays [.., T, S] of queries by keys, or [.., G * T, S] of a group's heads."""
    found = set()
    for work in reading.works:
        for array in work.instruction.arrays:
            wide = array.dtype == "f32" and len(array.sizes) > 2 and array.bytes >= SCORES
            if wide and any(array.sizes[-1] == S and array.sizes[-2] % T == 0 for T, S in pairs):
                found.add(f"{array} ({array.bytes / 1e9:.2f} GB) of scores is written to memory")
    yield from sorted(found)


def unfused(reading: Reading, implementation: str) -> Iterator[str]:
    found = reading.attention()
    if implementation not in found:
        yield f"attention is {found or 'nowhere to be seen'}, not {implementation}"


def temporaries_beside_cache(reading: Reading, cache: float) -> Iterator[str]:
    share = reading.memory.temporaries / cache
    if share > CACHE_SHARE:
        yield f"temporaries are {share:.1%} of the cache's {cache / 1e9:.2f} GB"


def copies_of_cache(reading: Reading, layer: float) -> Iterator[str]:
    """Of a layer's keys or more, once a call; those inside the loop over tokens too."""
    for instruction in reading.entry_copies(layer):
        yield f"{instruction.opcode} {instruction.array} moves a cache at every call"


def gathered_heads(reading: Reading, numbers: int, micro_batches: int) -> Iterator[str]:
    """The head's weight, or its table: once for the loss and once for its gradient."""
    gathers = sum(
        work.times
        for work in reading.works
        for wire in work.wires
        if wire.kind == "all-gather" and wire.array.numbers == numbers
    )
    if gathers > 2 * micro_batches:
        yield f"the head is gathered {gathers} times in {micro_batches} micro-batches"


def windowed_products(reading: Reading) -> Iterator[str]:
    """Products cut into partial ones that send weights around ("collective matmul")."""
    named = [name for name in reading.program.computations if "windowed_dot_general" in name]
    if named:
        yield f"products are windowed einsums: {', '.join(named[:3])}"
    permutes, _ = reading.collectives().get("collective-permute", (0, 0.0))
    if permutes:
        yield f"{permutes} collective-permutes: products are windowed einsums"


def reduced_whole(reading: Reading, smallest: int) -> Iterator[str]:
    """Gradients of `smallest` numbers or more of which a device needs its piece only."""
    found = {
        f"{count} x {array}": size
        for kind, count, array, size in reading.largest_collectives(100)
        if kind == "all-reduce" and size / count >= 2 * 2 * smallest
    }
    share = sum(found.values()) / max(reading.wire_bytes(), 1)
    if share > REDUCED:
        yield f"{share:.0%} of the links' bytes are gradients not scattered: {', '.join(found)}"


def too_many_products(reading: Reading, model_flops: float) -> Iterator[str]:
    share = (reading.total("flops") + reading.kernel_flops()) / model_flops
    if not 1 <= share <= PRODUCTS:
        yield f"products are {share:.2f} of the model's: expected 1 to {PRODUCTS}"


def wrong_estimate(reading: Reading, estimate: float) -> Iterator[str]:
    low, high = ESTIMATE
    share = estimate / reading.memory.total
    if not low <= share <= high:
        yield (
            f"--dry-run says {estimate / GIB:.2f} GiB, {share:.2f} of the compiler's"
            f" {reading.memory.total / GIB:.2f}: expected {low} to {high}"
        )
