"""Collectives of a compiled program: what one instruction sends and receives over a device's links.

instruction, or the fusion or call that holds one --> Wire, counted where it starts
"""

import dataclasses
from collections.abc import Iterator

from llava_mini_jax.cost.hlo import Array, Computation, Instruction, Program

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Wire:
    """A collective: its bytes that a device sends or receives over its links."""

    kind: str  # of COLLECTIVES
    array: Array  # the larger one of what goes in and what comes out
    bytes: float  # gathered ones once, summed and scattered ones once, all-reduced ones twice
    scope: str


def is_collective(instruction: Instruction) -> bool:
    """Whether it is one, or what a TPU has in its place inside of fusions."""
    kind = instruction.opcode.removesuffix("-start")
    return kind in COLLECTIVES or "AsyncCollective" in instruction.target


def wires_of(
    instruction: Instruction, computation: Computation, program: Program
) -> Iterator[Wire]:
    """The collectives that an instruction starts: itself, or what a fusion or a call holds."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield _wire(instruction, computation, scattered=False)
    if instruction.opcode not in ("fusion", "async-start"):
        return
    for name in instruction.called():
        body = program.computations.get(name, {})
        for inner in body.values():
            if inner.opcode in COLLECTIVES and _begins(inner, body):
                yield _wire(inner, body, scattered="all-reduce-scatter" in name)
            elif inner.opcode == "fusion":
                yield from wires_of(inner, body, program)


def _begins(collective: Instruction, body: Computation) -> bool:
    """Whether a fusion starts it. TPUs have asynchronous ones in all fusions that they go on in:
    the first one starts it by a custom call, the others are given its flag."""
    handlers = [
        i.target
        for i in body.values()
        if collective.name in i.operands and "AsyncCollective" in i.target
    ]
    if handlers:
        return any("Start" in handler for handler in handlers)
    flags = (i for i in body.values() if i.opcode == "parameter" and i.array.dtype == "u32")
    return not any(not flag.array.sizes and not flag.array.in_memory for flag in flags)


def _wire(collective: Instruction, computation: Computation, *, scattered: bool) -> Wire:
    kind = collective.opcode.removesuffix("-start")
    inputs = [a for n in collective.operands if n in computation for a in computation[n].arrays]
    given, results = sum(array.bytes for array in inputs), collective.arrays
    made = sum(array.bytes for array in results)
    if collective.opcode.endswith("-start") and kind != "all-reduce":
        made -= given  # its result has the inputs too
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
    on_wire = {"all-gather": made, "all-reduce": 2 * given}.get(kind, given)
    array = max((*inputs, *results), key=lambda a: a.bytes)
    return Wire(kind, array, on_wire, collective.scope)
