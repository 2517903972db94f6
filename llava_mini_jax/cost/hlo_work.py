"""What each instruction of a compiled program does: products, bytes of memory, of links.

    Program --works--> Work of every instruction that runs by itself, with how often it runs

Products are those of matrices and convolutions. Bytes are what a kernel must read and write of the
device's main memory: of an operand that is only sliced the slices, of an array that is updated in
place the update. XLA's own `cost_analysis` counts a loop's body once, so it is of no use here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from llava_mini_jax.cost.hlo import Array, Computation, Instruction, Program, root, runs
from llava_mini_jax.cost.hlo_wires import COLLECTIVES, Wire, is_collective, wires_of

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id",
    "while", "conditional", "call", "after-all", "opt-barrier", "optimization-barrier",
    "async-start", "async-update", "send", "recv", "recv-done", "send-done",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")
_THROUGH = ("bitcast", "reshape", "convert", "copy", "transpose")  # the same numbers
_NO_KERNELS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "GatherScatterIndicesBitpacked")


@dataclasses.dataclass(frozen=True)
class Work:
    """An instruction that runs by itself; numbers of one run."""

    instruction: Instruction
    computation: str
    times: int
    flops: float
    bytes: float
    cycles: int  # as the TPU compiler estimates them
    wires: tuple[Wire, ...]
    target: str  # of a custom call: the kernel's name, else ""
    inputs: tuple[Array, ...]
    made: tuple[Array, ...]  # arrays of main memory that it writes as a whole


def works(program: Program) -> list[Work]:
    found = []
    for name, times in runs(program).items():
        computation = program.computations.get(name, {})
        for instruction in computation.values():
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            operands = (computation.get(operand) for operand in instruction.operands)
            inputs = tuple(operand.array for operand in operands if operand is not None)
            found.append(
                Work(
                    instruction=instruction,
                    computation=name,
                    times=times,
                    flops=flops_of(instruction, computation, program),
                    bytes=bytes_of(instruction, computation, program),
                    cycles=int(cycles[1]) if cycles else 0,
                    wires=tuple(wires_of(instruction, computation, program)),
                    target=instruction.target,
                    inputs=inputs,
                    made=tuple(made_by(instruction, program)),
                )
            )
    return found


# --------------------------------------------------------------------------------------- products


def flops_of(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Two a multiply-add; of a fusion those of everything in it."""
    if instruction.opcode == "fusion":
        bodies = (program.computations.get(name, {}) for name in instruction.called())
        return sum(flops_of(i, body, program) for body in bodies for i in body.values())
    inputs = [computation.get(name) for name in instruction.operands[:2]]
    if len(inputs) < 2 or None in inputs:
        return 0.0
    left, right = (i.array.sizes for i in inputs if i is not None)
    if (
        instruction.opcode == "dot"
        or "$gemm" in instruction.target
        or "$matmul" in instruction.target
    ):
        return _dot_flops(instruction, left)
    if instruction.opcode == "convolution" or "$conv" in instruction.target:
        return _convolution_flops(instruction, left, right)
    return 0.0


def _dot_flops(instruction: Instruction, left: tuple[int, ...]) -> float:
    # As an instruction, or as cuBLAS's call has it in its json.
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes)
    summed = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * instruction.array.numbers * math.prod(left[d] for d in summed)


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """TPUs have products as convolutions, their batch dimensions as windows that mostly meet
    padding: only places of a window where data is are counted."""
    given, kernel, result = re.split("_|->", instruction.attribute("dim_labels"))
    out, window = instruction.array.sizes, instruction.attribute("window")
    total = 2.0 * right[kernel.index("i")]
    total *= math.prod(out[i] for i, label in enumerate(result) if not label.isdigit())
    for d, label in enumerate(sorted(label for label in result if label.isdigit())):
        sizes = (left[given.index(label)], right[kernel.index(label)], out[result.index(label)])
        total *= _meetings(sizes, *_window(window, d))
    return total


def _window(window: str, d: int) -> tuple[int, int, int, int]:
    """(stride, padding in front, dilation of the input, of the kernel) of a window's dimension."""
    parts = dict(part.split("=") for part in window.split())

    def value(name: str, default: str) -> str:
        return parts[name].split("x")[d] if name in parts else default

    front = int(value("pad", "0_0").split("_")[0])
    dilated, spread = (int(value(name, "1")) for name in ("lhs_dilate", "rhs_dilate"))
    return int(value("stride", "1")), front, dilated, spread


@functools.cache
def _meetings(
    sizes: tuple[int, int, int], stride: int, front: int, dilated: int, spread: int
) -> int:
    """Pairs of a place in the output and one in the kernel that meet a number of the input."""
    size, kernel, out = sizes
    last = (size - 1) * dilated
    pairs = 0
    for k in range(kernel):
        first = k * spread - front  # where output 0 looks; output o looks stride * o behind it
        if dilated == 1:
            low = max(0, -(first // stride)) if first < 0 else 0
            pairs += max(0, min(out - 1, (last - first) // stride) - low + 1)
        else:
            places = (first + stride * o for o in range(out))
            pairs += sum(0 <= p <= last and p % dilated == 0 for p in places)
    return pairs


# ------------------------------------------------------------------------------------------ bytes


def bytes_of(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Read from and written to the device's main memory by one run of it."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith("-done") or kind in COLLECTIVES:
        return 0.0
    inputs = [computation[name] for name in instruction.operands if name in computation]
    written = sum(memory_bytes(array) for array in instruction.arrays)
    if opcode == "fusion":
        return _fusion_bytes(instruction, inputs, program)
    if kind in ("copy", "slice", "dynamic-slice") and opcode != kind:
        # (what it is of, what is made, a flag) or the two exchanged: the smaller one is moved.
        moved = min((array.bytes for array in instruction.arrays[:2]), default=0.0)
        return moved * sum(array.in_memory for array in instruction.arrays[:2])
    if opcode in _SLICES:
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * memory_bytes(inputs[1].array)
    if instruction.target in _NO_KERNELS:
        return 0.0
    return written + sum(memory_bytes(i.array) for i in inputs)


def memory_bytes(array: Array) -> float:
    return array.bytes if array.in_memory else 0.0


def _fusion_bytes(fusion: Instruction, inputs: list[Instruction], program: Program) -> float:
    body = program.computations[fusion.called()[0]]
    read = 0.0
    for instruction in body.values():
        if instruction.opcode == "parameter" and int(instruction.literal) < len(inputs):
            whole = memory_bytes(inputs[int(instruction.literal)].array)
            read += whole and _share_read(instruction.name, body, program) * whole
    written = (_written(*pair, body) for pair in _outputs(fusion, body))
    return read + sum(written)


def _outputs(fusion: Instruction, body: Computation) -> Iterator[tuple[Instruction | None, Array]]:
    """Each array of a fusion's result, and the instruction inside that makes it."""
    last = root(body)
    if last is None or last.opcode != "tuple":
        outputs = [last]
    else:
        outputs = [body.get(name) for name in last.operands]
    if len(outputs) != len(fusion.arrays):  # a tuple in a tuple
        outputs = [None] * len(fusion.arrays)
    yield from zip(outputs, fusion.arrays, strict=True)


def made_by(instruction: Instruction, program: Program) -> Iterator[Array]:
    """Arrays of main memory that it writes as a whole, not in place of another one's part."""
    opcode = instruction.opcode
    if opcode == "fusion":
        body = program.computations[instruction.called()[0]]
        for output, array in _outputs(instruction, body):
            if array.bytes and _written(output, array, body) == array.bytes:
                yield array
    elif opcode.endswith("-start") or opcode == "dynamic-update-slice":
        return  # its -done, if it makes something
    elif opcode not in _FREE and instruction.target not in _NO_KERNELS:
        yield from (array for array in instruction.arrays if memory_bytes(array))


def _share_read(name: str, body: Computation, program: Program) -> float:
    """How much of a fusion's input is read: all of it, or what is sliced out of it."""
    share = 0.0
    for user, via in _users(name, body):
        if user.opcode in _SLICES and user.operands[0] == via:
            share += user.array.numbers / body[via].array.numbers
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == via:
            # Written in place; read from behind the write only where somebody slices it.
            share += _share_read(user.name, body, program) if _in_place(user, body) else 1.0
        elif user.opcode == "fusion":
            inner = program.computations[user.called()[0]]
            share += sum(
                _share_read(i.name, inner, program)
                for i in inner.values()
                if i.opcode == "parameter" and user.operands[int(i.literal)] == via
            )
        elif user.opcode != "tuple" and not is_collective(user):
            return 1.0
    return min(1.0, share)


def _users(name: str, body: Computation) -> Iterator[tuple[Instruction, str]]:
    """(who uses it, under which name), behind instructions that change no number."""
    for instruction in body.values():
        if name in instruction.operands:
            if instruction.opcode in _THROUGH and not instruction.is_root:
                yield from _users(instruction.name, body)
            else:
                yield instruction, name


def _written(output: Instruction | None, array: Array, body: Computation) -> float:
    while output is not None and output.opcode in ("bitcast", "reshape"):
        output = body.get(output.operands[0])
    if output is None:
        return memory_bytes(array)
    if output.opcode in ("parameter", "get-tuple-element") or is_collective(output):
        return 0.0
    if output.opcode == "dynamic-update-slice" and array.in_memory and _in_place(output, body):
        return body[output.operands[1]].array.bytes
    return memory_bytes(array)


def _in_place(update: Instruction, body: Computation) -> bool:
    """Whether what is updated is an input of the fusion as it lies there, or nobody keeps it."""
    last = root(body)
    outputs = () if last is None else last.operands if last.opcode == "tuple" else (last.name,)
    source: Instruction | None = update
    while source is not None and source.opcode in ("dynamic-update-slice", "bitcast", "reshape"):
        source = body.get(source.operands[0])
    is_parameter = source is not None and source.opcode == "parameter"
    return update.name not in outputs or is_parameter
