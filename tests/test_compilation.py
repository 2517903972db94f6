"""The folder of compiled programs: what is kept, where, and what goes wrong without an end."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import eval as eval_program
import train
from llava_mini_jax import cli, compilation
from llava_mini_jax.errors import InputError
from tests import tiny_model
from tests.conftest import ROOT

# A program that takes long enough to compile, and what came of it: its result, hits, entries.
CODE = """
import resource, sys
from collections import Counter
from llava_mini_jax import compilation
if sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
compilation.keep_programs(sys.argv[1] or None, "program", processes=int(sys.argv[2]))
import jax, jax.numpy as jnp
events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
@jax.jit
def slow(x):
    for power in range(40):
        x = jnp.sort(jnp.sin(x) ** power + x[::-1])
    return x.sum()
x = jnp.arange(64.0)
events.clear()
result = slow(x)
found = (events["/jax/compilation_cache/cache_" + name] for name in ("hits", "misses"))
print(result, *found)
"""
NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[str, bool, bool, str]]:
    """Runs CODE: its result, whether the program was read, whether written, and stderr."""

    def run(given: str = "", *more: str, processes: int = 1, **variables: str):
        kept = {name: value for name, value in os.environ.items() if name not in NAMES}
        kept |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-c", CODE, given, str(processes), *more]
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        result, hits, misses = done.stdout.split()
        return result, int(hits) > 0, int(misses) > 0, done.stderr

    return run


def programs(folder: Path) -> list[Path]:
    return sorted(folder.glob("jit_slow-*-cache"))


def test_a_second_process_reads_what_the_first_one_compiled(run, tmp_path) -> None:
    result, *first = run()
    assert first == [False, True, ""]
    assert len(programs(tmp_path / "cache" / "llava-mini-jax" / "programs")) == 1
    assert run() == (result, True, False, "")
    assert run("none") == (result, False, False, "")
    # Other instructions make another program: machines may share a folder.
    assert run(XLA_FLAGS="--xla_cpu_max_isa=SSE4_2")[1:] == (False, True, "")


def test_the_folder_is_the_options_or_that_of_jax(run, tmp_path) -> None:
    for number, (given, variables) in enumerate(
        [
            (str(tmp_path / "named" / "0"), {}),
            ("", {NAMES[0]: str(tmp_path / "named" / "1")}),
            (str(tmp_path / "named" / "2"), {NAMES[0]: str(tmp_path / "other")}),
        ]
    ):
        assert run(given, **variables)[2:] == (True, "")
        assert len(programs(tmp_path / "named" / str(number))) == 1
    assert run(str(tmp_path / "off"), JAX_ENABLE_COMPILATION_CACHE="0")[1:] == (False, False, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named"]


def test_several_processes_need_a_folder_that_is_named(run, tmp_path) -> None:
    assert run(processes=2)[1:] == (False, False, "")
    assert not (tmp_path / "cache").exists()
    assert run(str(tmp_path / "shared"), processes=2)[2]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
def test_a_damaged_program_is_compiled_anew_once(run, tmp_path, damage) -> None:
    result, *_ = run(str(tmp_path / "programs"))
    (entry,) = programs(tmp_path / "programs")
    whole = entry.read_bytes()
    half = len(whole) // 2
    changed = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
    entry.write_bytes({"empty": b"", "cut": whole[:half], "changed": changed}[damage])
    again, hit, _, said = run(str(tmp_path / "programs"))
    assert (again, hit) == (result, False)
    assert said.count("\n") == 1 and said.startswith("program: reading compiled programs in ")
    assert run(str(tmp_path / "programs")) == (result, True, False, "")


def test_a_full_disk_leaves_no_half_of_a_program(run, tmp_path) -> None:
    result, _, _, said = run(str(tmp_path / "programs"), "4000")
    assert said.count("\n") == 1 and said.startswith("program: writing compiled programs in ")
    assert programs(tmp_path / "programs") == []
    assert run(str(tmp_path / "programs"))[::3] == (result, "")


def test_a_folder_that_cannot_be_written_is_told_and_the_run_goes_on(run, tmp_path) -> None:
    (tmp_path / "file").touch()
    *_, said = run(str(tmp_path / "file" / "below"))
    assert said == (
        f"program: compiled programs are not kept: {tmp_path}/file/below cannot be written "
        '(Not a directory); name another folder by --compilation-cache, or "none"\n'
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        assert "cannot be written (Permission denied)" in run(str(locked))[-1]
    assert "is in no known home" in run(HOME="~", XDG_CACHE_HOME="relative")[-1]


def test_the_longest_unused_programs_go(tmp_path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "old", (1e9 + 1, 1e9 - 2))  # written first, read last
    compilation._drop_oldest(str(tmp_path), 300)
    assert len(list(tmp_path.iterdir())) == 3
    compilation._drop_oldest(str(tmp_path), 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


FOLDER_OF_CONFIG = "configs/digits.py"


@pytest.fixture
def enabled(request):
    """Whether JAX's cache is on: for the whole process, so that it is put back."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", request.param)
    yield request.param
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize("enabled", [True, False], indirect=True)
@pytest.mark.parametrize("given", ["", __file__])
def test_what_is_no_folder_is_refused_by_all_three_programs(
    given, enabled, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    model = str(tiny_model.folder("paper"))
    capsys.readouterr()
    for name, main, words in (
        ("llava-mini", cli.main, ["ask", model, "hello"]),
        ("eval.py", eval_program.main, ["--model", model, "--out", str(tmp_path / "out")]),
        ("train.py", train.main, [FOLDER_OF_CONFIG, "--workdir", str(tmp_path / "run")]),
    ):
        assert main([*words, "--compilation-cache", given]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"{name}: --compilation-cache is ") and said.count("\n") == 1
        assert said.endswith(', which is not a folder; give one, or "none"\n')
    assert not (tmp_path / "run").exists()


def test_all_three_programs_use_the_folder(tmp_path, monkeypatch) -> None:
    asked: list[tuple[str | None, str]] = []

    def heard(given: str | None, program: str, **_: int) -> None:
        asked.append((given, program))
        raise InputError("heard")

    monkeypatch.setattr(compilation, "keep_programs", heard)
    monkeypatch.chdir(ROOT)
    model = str(tiny_model.folder("paper"))
    option = ["--compilation-cache", "D"]
    for words in ([], option):
        cli.main(["ask", model, "hello", *words])
        eval_program.main(["--model", model, "--out", str(tmp_path / "out"), *words])
        train.main([FOLDER_OF_CONFIG, "--workdir", str(tmp_path / "run"), *words])
    names = ["llava-mini", "eval.py", "train.py"]
    assert asked == [(given, name) for given in (None, "D") for name in names]


def test_the_package_alone_leaves_jax_as_it_is() -> None:
    import llava_mini_jax

    before = dict(jax.config.values)
    llava_mini_jax.load(tiny_model.folder("paper"))
    assert dict(jax.config.values) == before
