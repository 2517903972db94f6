"""What a compiled program takes of one device: memory, products, traffic, and a bound on its time.

    jax.stages.Compiled --text, memory_analysis--> Reading --roofline--> Times

Bounds are of a machine without delays: products at the chip's peak, traffic at its full bandwidth.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from llava_mini_jax.cost import attention_kernels, hlo, hlo_work
from llava_mini_jax.cost.chips import Chip
from llava_mini_jax.cost.hlo import Instruction, Program
from llava_mini_jax.cost.hlo_work import Work

KERNEL_SHARE = 0.5  # of a TPU's peak that fused attention is assumed to reach; no text says it


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on a device while the program runs, as the compiler plans them."""

    arguments: int
    temporaries: int
    outputs: int  # those that take no argument's place
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Reading:
    """A compiled program, read; everything is of one device."""

    program: Program
    works: list[Work]
    memory: MemoryUse

    def total(self, name: str, works: Iterable[Work] | None = None) -> float:
        """The sum of a number of Work (flops, bytes, cycles), loops multiplied out."""
        given = self.works if works is None else works
        return sum(work.times * getattr(work, name) for work in given)

    def kernels(self) -> list[tuple[Work, attention_kernels.Kernel]]:
        found = ((work, attention_kernels.kernel_of(work)) for work in self.works)
        return [(work, kernel) for work, kernel in found if kernel is not None]

    def kernel_flops(self) -> float:
        return sum(work.times * kernel.flops for work, kernel in self.kernels())

    def xla_attention(self) -> list[Work]:
        """What of attention is no kernel: scores and softmax, or what is around a kernel."""
        return [
            work
            for work in self.works
            if attention_kernels.is_xla_attention(work.instruction)
            and attention_kernels.kernel_of(work) is None
        ]

    def attention(self) -> dict[str, Any]:
        """By implementation: how often its kernels run; of XLA's the largest scores."""
        found: dict[str, Any] = dict(
            sum((Counter({k.implementation: w.times}) for w, k in self.kernels()), Counter())
        )
        scores = [
            array
            for work in self.works
            if attention_kernels.has_xla_scores(work.instruction)
            for array in work.made
        ]
        if scores:
            found["xla"] = str(max(scores, key=lambda array: array.bytes))
        return found

    def collectives(self) -> dict[str, tuple[int, float]]:
        """(how many, bytes) by kind."""
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for work in self.works:
            for wire in work.wires:
                found[wire.kind][0] += work.times
                found[wire.kind][1] += work.times * wire.bytes
        return {kind: (int(count), size) for kind, (count, size) in found.items()}

    def wire_bytes(self) -> float:
        return sum(size for _, size in self.collectives().values())

    def largest_collectives(self, count: int) -> list[tuple[str, int, str, float]]:
        """(kind, how often, array, bytes in all) of those that move most."""
        found: dict[tuple[str, str], float] = defaultdict(float)
        times: Counter[tuple[str, str]] = Counter()
        for work in self.works:
            for wire in work.wires:
                key = (wire.kind, str(wire.array))
                found[key] += work.times * wire.bytes
                times[key] += work.times
        ranked = sorted(found, key=lambda key: -found[key])[:count]
        return [(kind, times[kind, name], name, found[kind, name]) for kind, name in ranked]

    def largest_arrays(self, count: int) -> list[tuple[str, float, str]]:
        """(array, bytes, scope) of what instructions make that is not updated in place."""
        found: dict[str, tuple[float, str]] = {}
        for work in self.works:
            for array in work.made:
                found.setdefault(str(array), (array.bytes, work.instruction.scope))
        ranked = sorted(found.items(), key=lambda item: -item[1][0])[:count]
        return [(name, size, scope) for name, (size, scope) in ranked]

    def entry_copies(self, smallest: float) -> list[Instruction]:
        """Copies and transposes outside of any loop of arrays of `smallest` bytes or more."""
        entry = self.program.computations[self.program.entry]
        return [
            i
            for i in entry.values()
            if _only_moves(i, self.program)
            and i.array.bytes >= smallest
            and all(array.in_memory for array in i.arrays if array.bytes >= smallest)
        ]


_MOVES = {"copy", "transpose", "copy-start"}
_KEEPS = {"parameter", "bitcast", "reshape", "tuple", "constant"}


def _only_moves(instruction: Instruction, program: Program) -> bool:
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVES
    body = program.computations[instruction.called()[0]].values()
    opcodes = {i.opcode for i in body} - _KEEPS
    return bool(opcodes) and opcodes <= _MOVES


def read(compiled: Any) -> Reading:
    """Of `jax.stages.Compiled`."""
    plan = compiled.memory_analysis()
    memory = MemoryUse(
        arguments=plan.argument_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        outputs=plan.output_size_in_bytes - plan.alias_size_in_bytes,
        code=plan.generated_code_size_in_bytes,
    )
    return read_text(compiled.as_text(), memory)


def read_text(text: str, memory: MemoryUse) -> Reading:
    program = hlo.parse(text)
    return Reading(program, hlo_work.works(program), memory)


# ------------------------------------------------------------------------------------------- time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a program on one device, each a bound of its own."""

    products: float  # all products at the peak, fused attention's included
    traffic: float  # all bytes at full bandwidth
    links: float  # all bytes between devices over all links
    floors: dict[str, float]  # of the program as a whole, by how it is made; the first one counts


def times(reading: Reading, chip: Chip) -> Times:
    peak, bandwidth = chip.tflops * 1e12, chip.bandwidth * 1e9
    flops = reading.total("flops") + reading.kernel_flops()
    floors = _tpu_floors(reading, chip) if chip.is_tpu else _gpu_floors(reading, peak, bandwidth)
    return Times(
        products=flops / peak,
        traffic=reading.total("bytes") / bandwidth,
        links=reading.wire_bytes() / (chip.links * 1e9),
        floors=floors,
    )


def _tpu_floors(reading: Reading, chip: Chip) -> dict[str, float]:
    """The compiler estimates cycles of everything but kernels that it did not write."""
    cycles = reading.total("cycles") / (chip.clock * 1e9)
    kernels = reading.kernel_flops() / (KERNEL_SHARE * chip.tflops * 1e12)
    return {
        f"the compiler's cycles, fused attention at {KERNEL_SHARE:.0%} of peak": cycles + kernels
    }


def _gpu_floors(reading: Reading, peak: float, bandwidth: float) -> dict[str, float]:
    """XLA runs a GPU's kernels one after the other, and its attention is limited by its bytes."""
    attention, fused = reading.xla_attention(), reading.kernel_flops()
    products = reading.total("flops") - reading.total("flops", attention) + fused
    of_kernels = {id(work): kernel.flops for work, kernel in reading.kernels()}
    one_by_one = sum(
        work.times * max(of_kernels.get(id(work), work.flops) / peak, work.bytes / bandwidth)
        for work in reading.works
    )
    scores = reading.total("bytes", attention) / bandwidth
    return {
        "products at peak, then XLA's attention by its bytes": products / peak + scores,
        "each kernel the longer of its products and its bytes, in turn": one_by_one,
    }
