"""Reads a pickle as data: nothing in it can run.

    bytes --pickletools.genops--> opcodes --the few that data needs--> dicts, lists, numbers, text
                                     |                                      |
                          any other: refused by name        "call NAME with ARGUMENTS":
                                                            NAME looked up in the caller's table,
                                                            refused by name where it is not there

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever
the program names. This one has no import, no attribute access, no class of any kind and no
`__setstate__`; the only functions that it calls are those in the table, which belong to the caller
and check their arguments. (torch's `weights_only=True` works the same way.) Python's standard
`pickletools` splits the bytes into opcodes and carries none of them out.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from llava_mini_jax.errors import short

# A pickle takes about 300 bytes and 45 opcodes for each tensor. These limits, far above every
# model, keep a made-up file from filling the memory (one byte can make a dict) or the day.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_OPCODES = 300_000

PUSH_ARGUMENT = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
PUSH_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
TUPLE_OF = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
GET = {"BINGET", "LONG_BINGET"}
NO_EFFECT = {"PROTO", "FRAME"}


DAMAGED = "download it again, or have it saved again as safetensors."
UNTRUSTED = (
    "only what plain tensors need is allowed, and nothing of it was run or loaded: get the weights "
    "as safetensors, or have only the state dict saved."
)


class BadPickleError(ValueError):
    """What is wrong with a pickle, as the middle of a sentence: "FILE <problem>; <remedy>"."""

    def __init__(self, problem: str, remedy: str = DAMAGED) -> None:
        super().__init__(problem)
        self.remedy = remedy


@dataclass(frozen=True)
class Name:
    """Stands for a Python object that a pickle asks for by name; it is not that object.

    `call`, where there is one, is what happens when the pickle wants the object called.
    """

    text: str
    call: Callable[..., object] | None = None

    def __repr__(self) -> str:
        return self.text


def read_pickle(
    stream: BinaryIO, names: Mapping[str, Name], persistent: Callable[[object], object]
) -> Any:
    """The value of the pickle that begins at the stream's position, which moves to its end.

    `names` holds every name that the pickle may ask for, as "module.attribute"; `persistent` turns
    a persistent id into a value. Both raise BadPickleError at arguments that they do not expect, as
    this function does at everything else that is not plain data.
    """
    machine = _Machine(names, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise BadPickleError(f"holds a pickle of more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except BadPickleError:
        raise
    except (ValueError, OverflowError, EOFError) as error:  # from pickletools, at broken bytes
        raise BadPickleError(f"holds a pickle that breaks off or is damaged ({error})") from error
    raise BadPickleError("holds a pickle without an end")


class _Machine:
    """The stack machine: `stack` since the last mark, `marked` below it, `memo` of put values."""

    def __init__(self, names: Mapping[str, Name], persistent: Callable[[object], object]) -> None:
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode of those that plain data, names and calls need.

        One long switch: whoever checks that nothing can run here has it all on a screen.
        """
        if opcode in PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in PUT:
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif opcode in GET:
            if argument not in self.memo:
                raise BadPickleError(f"holds a pickle that gets entry {argument}, never put")
            self.stack.append(self.memo[argument])
        elif opcode in PUSH_CONSTANT:
            self.stack.append(PUSH_CONSTANT[opcode]())
        elif opcode in TUPLE_OF:
            items = [self.pop() for _ in range(TUPLE_OF[opcode])]
            self.stack.append(tuple(reversed(items)))
        elif opcode == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif opcode == "TUPLE":
            items = self.pop_to_mark()  # which changes self.stack
            self.stack.append(tuple(items))
        elif opcode in ("APPEND", "APPENDS"):
            items = [self.pop()] if opcode == "APPEND" else self.pop_to_mark()
            self.top_as(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if opcode == "SETITEM" else self.pop_to_mark()
            self.set_items(items)
        elif opcode == "GLOBAL":
            self.push_name(argument.replace(" ", ".", 1))
        elif opcode == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.push_name(f"{module}.{attribute}" if _texts(module, attribute) else short(module))
        elif opcode == "REDUCE":
            arguments, function = self.pop(), self.pop()
            self.stack.append(_call(function, arguments))
        elif opcode == "BINPERSID":
            self.stack.append(self.persistent(self.pop()))
        elif opcode == "BUILD":
            self.build()
        elif opcode not in NO_EFFECT:
            raise BadPickleError(
                f"holds a pickle with the opcode {opcode}, which no tensor needs", UNTRUSTED
            )

    def top(self) -> Any:
        if not self.stack:
            raise BadPickleError("holds a pickle that takes a value from an empty stack")
        return self.stack[-1]

    def top_as(self, kind: type) -> Any:
        if not isinstance(self.top(), kind):
            raise BadPickleError(
                f"holds a pickle that fills {short(self.top())} as if it were a {kind.__name__}"
            )
        return self.top()

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marked:
            raise BadPickleError("holds a pickle that looks for a mark that was never set")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def push_name(self, text: str) -> None:
        if text not in self.names:
            shown = text if text.isprintable() and len(text) < 200 else short(text)
            raise BadPickleError(f"asks for {shown}", UNTRUSTED)
        self.stack.append(self.names[text])

    def set_items(self, items: list[Any]) -> None:
        """Keys are text or whole numbers: nested tuples as keys can take for ever to hash."""
        target = self.top_as(dict)
        if len(items) % 2:
            raise BadPickleError("holds a pickle with a key that has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise BadPickleError(f"holds a pickle with the key {short(key)}, not text or int")
            if key in target:
                raise BadPickleError(f"holds a pickle with the key {short(key)} twice")
            target[key] = value

    def build(self) -> None:
        """A state dict carries its module versions as attributes; they are left out."""
        state = self.pop()
        self.top_as(dict)
        if not isinstance(state, dict) or set(state) != {"_metadata"}:
            raise BadPickleError(
                f"holds a pickle that sets the attributes {short(state)} of a dict"
            )


def _texts(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _call(function: object, arguments: object) -> object:
    if not isinstance(function, Name) or function.call is None:
        raise BadPickleError(f"holds a pickle that calls {short(function)}")
    if not isinstance(arguments, tuple):
        raise BadPickleError(f"holds a pickle that calls {function.text} with {short(arguments)}")
    try:
        return function.call(*arguments)
    except TypeError as error:  # too few or too many arguments
        raise BadPickleError(f"holds a pickle that misuses {function.text} ({error})") from error
