"""The text of a compiled program (`compiled.as_text()`) as computations of instructions.

    HLO text --parse--> Program: computations by name, the entry's name
    Program --runs--> how often each computation runs, loops multiplied out

A computation is what a loop, a call or a fusion refers to. Of fusions only the instruction that
starts one runs by itself; what stands in them is looked up where it matters (cost/hlo_work.py).
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_BEGINNING = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computation|branch_computations)=(\{[^}]*\}|\S+)")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str  # as HLO says it: "bf16", "pred", ...
    sizes: tuple[int, ...]
    in_memory: bool  # the device's main one; TPU layouts name others, S(1) is VMEM

    @property
    def numbers(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        return self.numbers * _bits(self.dtype) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@functools.cache
def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # of f8e4m3fn the first ones
    return int(digits[0]) if digits else {"pred": 8}.get(dtype, 0)  # a token has none


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result's, of a tuple all of them
    operands: tuple[str, ...]  # names, in the same computation
    literal: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str  # everything behind them
    is_root: bool

    @property
    def array(self) -> Array:
        """The largest one of the result."""
        return max(self.arrays, key=lambda a: a.bytes, default=Array("token", (), False))

    @property
    def scope(self) -> str:
        """Where it stands in the code, as JAX names it: "jit(f)/llm/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The kernel that a custom call names, else ""."""
        return self.attribute("custom_call_target") if self.opcode == "custom-call" else ""

    def attribute(self, name: str) -> str:
        """The value of `name=value` among the attributes, "" if it has none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1].strip('{}"%') if found else ""

    def called(self) -> list[str]:
        """Computations that it runs or fuses; of a `while` its body."""
        if self.opcode == "while":
            return [self.attribute("body")]
        if self.opcode == "conditional" and "true_computation" in self.attributes:
            return [self.attribute("false_computation"), self.attribute("true_computation")]
        found = _CALLED.search(self.attributes)
        return _NAME.findall(found[1]) if found else []


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The computations of a program's text. Raises ValueError for a text without an entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in _logical_lines(text):
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif beginning := _BEGINNING.match(line):
            found = _instruction(beginning, line[beginning.end() :])
            current[found.name] = found
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Program(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with an instruction's json of several lines in one."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def _instruction(beginning: re.Match, body: str) -> Instruction:
    end = _closed(body) + 1 if body.startswith("(") else body.index(" ")
    shape, call = body[:end], body[end:].lstrip()
    opcode, _, rest = call.partition("(")
    end = _closed(rest, depth=1)
    arrays = tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )
    return Instruction(
        name=beginning[2],
        opcode=opcode,
        arrays=arrays,
        operands=tuple(_NAME.findall(rest[:end])),
        literal=rest[:end],
        attributes=rest[end + 1 :],
        is_root=beginning[1] is not None,
    )


def _closed(text: str, depth: int = 0) -> int:
    """Where the parenthesis closes that `text` begins with, or has been opened before it."""
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def root(computation: Computation) -> Instruction | None:
    return next((i for i in computation.values() if i.is_root), None)


# ------------------------------------------------------------------------------ how often it runs


def runs(program: Program) -> Counter[str]:
    """How often each computation runs, those inside fusions left out.

    A loop whose length is data (tokens of an answer) counts once, and of a condition the branch of
    "false": in decoding, the one that draws nothing.
    """
    times: Counter[str] = Counter()

    def walk(name: str, count: int) -> None:
        times[name] += count
        for instruction in program.computations.get(name, {}).values():
            for callee, repeats in _callees(instruction, program):
                walk(callee, count * repeats)

    walk(program.entry, 1)
    return times


def _callees(instruction: Instruction, program: Program) -> Iterator[tuple[str, int]]:
    if instruction.opcode == "while":
        yield instruction.called()[0], trip_count(instruction, program)
    elif instruction.opcode == "conditional":
        yield instruction.called()[0], 1
    elif instruction.opcode in ("call", "async-start"):
        yield from ((name, 1) for name in instruction.called())


def trip_count(loop: Instruction, program: Program) -> int:
    """How often a `while` runs: as the compiler says, or as its condition and counter do."""
    known = re.search(r'known_trip_count[^}]*"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.attribute("condition")]
    test = _resolved(condition, program, lambda i: i.opcode == "compare")
    if test is None or test[1].attribute("direction") != "LT":
        return 1
    found, compare = test
    counter, limit = (found.get(name) for name in compare.operands)
    value = _constant(limit, found)
    if value is None or counter is None:
        return 1
    return max(1, -(-value // _step(loop, counter, program)))


def _resolved(computation, program, wanted):
    """(computation, instruction) of the root if it is `wanted`, looked for in a fusion too."""
    last = root(computation)
    while last is not None and last.opcode == "fusion":
        inner = program.computations[last.called()[0]]
        given = [computation.get(name) for name in last.operands]
        # A fused parameter stands for the operand outside.
        outside = {i.name: given[int(i.literal)] for i in inner.values() if i.opcode == "parameter"}
        computation = inner | {name: i for name, i in outside.items() if i is not None}
        last = root(inner)
    return (computation, last) if last is not None and wanted(last) else None


def _constant(instruction: Instruction | None, computation: Computation) -> int | None:
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _step(loop: Instruction, counter: Instruction, program: Program) -> int:
    """What a pass adds to the counter: loops that the compiler has unrolled count in twos."""
    body = program.computations[loop.attribute("body")]
    last, index = root(body), counter.attribute("index")
    if last is None or last.opcode != "tuple" or not index:
        return 1
    following = body.get(last.operands[int(index)])
    if following is None or following.opcode != "add":
        return 1
    steps = (_constant(body.get(name), body) for name in following.operands)
    return max(1, next((step for step in steps if step is not None), 1))
