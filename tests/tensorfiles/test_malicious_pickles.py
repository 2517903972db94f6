"""Nothing in a torch file ever runs, and no odd pickle gets through.

The pickles are put together opcode by opcode (see bad_files.py). Where one of them runs a command,
the command makes a file, and a first test shows that Python's own unpickler makes it.
"""

import io
import pickle
import pickletools
from pathlib import Path

import pytest

from tests.tensorfiles.bad_files import (
    Call,
    Code,
    Name,
    encode,
    program,
    refusal,
    tensor,
    write_zip,
)

FIXTURES = Path(__file__).parents[1] / "golden" / "torch_bin"


def payloads(command: str, python: str) -> dict[str, tuple[str, bytes]]:
    """Name of the trick -> what the message says about it, and the pickle."""
    text = encode(command)
    stack_global = encode("os") + encode("path.os.system") + b"\x93"
    return {
        "system": ("os.system", encode(Call(Name("os", "system"), (command,)))),
        "posix": ("posix.system", encode(Call(Name("posix", "system"), (command,)))),
        "subprocess": (
            "subprocess.check_call",
            encode(Call(Name("subprocess", "check_call"), (["sh", "-c", command],))),
        ),
        "eval": ("builtins.eval", encode(Call(Name("builtins", "eval"), (python,)))),
        "exec": ("builtins.exec", encode(Call(Name("builtins", "exec"), (python,)))),
        "eval of Python 2": (
            "__builtin__.eval",
            encode(Call(Name("__builtin__", "eval"), (python,))),
        ),
        "dotted name": ("os.path.os.system", b"\x80\x04" + stack_global + text + b"\x85R"),
        "INST": ("INST", b"(" + text + b"ios\nsystem\n"),
        "OBJ": ("os.system", b"(" + encode(Name("os", "system")) + text + b"o"),
    }


LIVE = sorted(payloads("", ""))


def canary_payload(trick: str, canary: Path) -> tuple[str, bytes]:
    canary_text = str(canary)
    return payloads(f"touch {canary_text}", f"__import__('os').mknod({canary_text!r})")[trick]


@pytest.mark.parametrize("trick", LIVE)
def test_the_payloads_are_live(trick: str, tmp_path: Path) -> None:
    """Python's own unpickler runs every one of them: what is refused below is no blank shot."""
    _, code = canary_payload(trick, tmp_path / "canary")
    pickle.loads(b"\x80\x02" + code + b".", fix_imports=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", ["top", "value", "hooks", "legacy start", "legacy keys"])
@pytest.mark.parametrize("trick", LIVE)
def test_malicious_pickles_are_refused_and_do_not_run(
    trick: str, place: str, tmp_path: Path
) -> None:
    said, code = canary_payload(trick, tmp_path / "canary")
    path = tmp_path / "model.bin"
    if place == "top":
        write_zip(path, program(Code(code)))
    elif place == "value":
        write_zip(path, program({"w": tensor(), "x": Code(code)}))
    elif place == "hooks":
        write_zip(path, program({"w": tensor(None, 0, (6,), (1,), False, Code(code))}))
    elif place == "legacy start":
        path.write_bytes(program(Code(code)))
    else:
        legacy = (FIXTURES / "state_dict_legacy.bin").read_bytes()
        stream = io.BytesIO(legacy)
        for _ in range(4):
            list(pickletools.genops(stream))
        path.write_bytes(legacy[: stream.tell()] + program(Code(code)) + legacy[stream.tell() :])
    message = refusal(path)
    assert said in message and "nothing of it was run" in message and "safetensors" in message
    assert not (tmp_path / "canary").exists()


REFUSED_NAMES = [
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("torch.storage", "_load_from_bytes"),
    ("torch", "load"),
    ("builtins", "getattr"),
    ("functools", "partial"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("collections", "_sys.modules"),
    ("llava_mini_jax.errors", "InputError"),
]


@pytest.mark.parametrize("name", REFUSED_NAMES)
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
def test_names_outside_of_the_table_are_refused_by_name(
    name: tuple[str, str], opcode: str, tmp_path: Path
) -> None:
    code = encode(Name(*name))
    if opcode == "STACK_GLOBAL":
        code = encode(name[0]) + encode(name[1]) + b"\x93"
    message = refusal(write_zip(tmp_path / "model.bin", program({"w": Code(code)})))
    assert "asks for " + ".".join(name) in message


ODD_PROGRAMS = {
    # opcodes that make, change or find objects
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "NEWOBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92", "NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "EXT1"),
    "PERSID": (b"Pstorage\n", "PERSID"),
    "BYTEARRAY8": (b"\x96" + b"\xff" * 7 + b"\x7f", "damaged"),
    "BUILD": (encode({}) + encode({"__class__": 1}) + b"b", "__class__"),
    "BUILD on a name": (encode(Name("torch", "FloatStorage")) + b"}b", "torch.FloatStorage"),
    "BUILD with slots": (encode({}) + encode((None, {"items": 1})) + b"b", "items"),
    # calls with arguments that torch never writes
    "call of text": (encode(Call("os.system", ("true",))), "os.system"),
    "call of a storage type": (
        encode(Call(Name("torch", "FloatStorage"), (10**9,))),
        "FloatStorage",
    ),
    "call with a list": (encode(Call(Name("collections", "OrderedDict"), [])), "OrderedDict"),
    "OrderedDict with items": (
        encode(Call(Name("collections", "OrderedDict"), ([],))),
        "OrderedDict",
    ),
    "too few arguments": (
        encode(Call(Name("torch._utils", "_rebuild_tensor_v2"), (1,))),
        "_rebuild_tensor_v2",
    ),
    "parameter of text": (
        encode(Call(Name("torch._utils", "_rebuild_parameter"), ("x", True, None))),
        "parameter",
    ),
    "Size of text": (encode(Call(Name("torch", "Size"), ("x",))), "torch.Size"),
    # a stack and a memo that do not work out
    "POP": (b"0", "POP"),
    "call of nothing": (b"(R", "empty stack"),
    "no mark": (b"t", "mark"),
    "unknown memo": (b"h\x07", "entry 7"),
    "append to a dict": (b"}Na", "list"),
    "item of a list": (b"]" + encode("a") + b"Ns", "dict"),
    "odd items": (b"}(" + encode("a") + b"u", "no value"),
    "key twice": (b"}(" + encode("a") * 4 + b"u", "'a'"),
    "truncated text": (b"X\xff\xff\xff\xff", "damaged"),
    "huge text": (b"\x8d" + b"\xff" * 7 + b"\x7f", "damaged"),
    "unknown opcode": (b"\xff", "damaged"),
}


@pytest.mark.parametrize("name", ODD_PROGRAMS)
def test_odd_programs_are_refused(name: str, tmp_path: Path) -> None:
    code, said = ODD_PROGRAMS[name]
    path = write_zip(tmp_path / "model.bin", program({"w": tensor(), "x": Code(code)}))
    assert said in refusal(path)


def test_bombs_end_soon(tmp_path: Path) -> None:
    doubling = b")q\x00" + b"h\x00\x86q\x00" * 60  # each tuple holds the one before it twice
    bombs = {
        "hash": (b"}" + doubling + b"Ns", "not text or int"),
        "message": (encode(Call(Code(doubling), ())), "calls (("),
        "memo": (b"}r\xff\xff\xff\xff", "'w': 'dict'"),
        "objects": (b"}" * 16_000_000, "300,000 opcodes"),
        "size": (b"N" * 17_000_000, "16,777,216 at most"),
        "depth": (b"](" * 90_000 + b"e" * 90_000, "'w': 'list'"),
    }
    for name, (code, said) in bombs.items():
        assert said in refusal(write_zip(tmp_path / f"{name}.bin", program({"w": Code(code)})))
