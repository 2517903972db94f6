"""Memory that is full is told in one sentence, whoever says so and wherever."""

import errno
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_program
import train
from llava_mini_jax import cli
from llava_mini_jax.errors import memory_sentence
from llava_mini_jax.inference import seeing_programs, slots
from llava_mini_jax.training import checkpoint, loop
from llava_mini_jax.weights import import_hf
from tests import tiny_model

ROOT = Path(__file__).resolve().parents[1]
TOO_MUCH = 2**46


def on_a_device(*_args, **_settings):
    return jnp.zeros(TOO_MUCH, jnp.int8).block_until_ready()


def in_a_program(*_args, **_settings):
    wide = jax.jit(lambda x: jnp.sort(jnp.broadcast_to(x, TOO_MUCH).astype(jnp.int8))[::7])
    return wide(jnp.ones(())).block_until_ready()


def on_the_host(*_args, **_settings):
    return np.zeros(TOO_MUCH, np.int8)


def without_a_word(*_args, **_settings):
    return bytearray(2**60)


def no_map(*_args, **_settings):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def as_a_cause(*_args, **_settings):
    try:
        on_a_device()
    except Exception as error:
        raise TypeError("a library's own error") from error


FULL = [on_a_device, in_a_program, on_the_host, without_a_word, no_map, as_a_cause]


def check(status: int, err: str, name: str, full) -> None:
    said = [line for line in err.splitlines() if "memory is full" in line]
    assert status == 1 and len(said) == 1 and "Traceback" not in err, err
    assert said[0].startswith(f"{name}: memory is full: ")
    needed = {in_a_program: " GB more are needed", without_a_word: "more is needed"}
    needed[no_map] = "more is needed"
    assert needed.get(full, "70,368.74 GB more are needed") in said[0]
    assert "this machine has " in said[0] and "; try " in said[0]


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("place", ["load", "prefill", "decode"])
def test_asking(place, full, monkeypatch, capsys) -> None:
    where = {
        "load": (import_hf, "_assemble"),
        "prefill": (seeing_programs, "embed_text"),
        "decode": (slots, "decode"),
    }
    monkeypatch.setattr(*where[place], full)
    status = cli.main(["ask", str(tiny_model.folder("paper")), "how many 7s are there?"])
    check(status, capsys.readouterr().err, "llava-mini", full)


@pytest.mark.parametrize("full", FULL)
def test_evaluating(full, monkeypatch, capsys, tmp_path) -> None:
    from llava_mini_jax.evaluation.run import evaluate

    monkeypatch.setattr(evaluate, "evaluate", full)
    folder = str(tiny_model.folder("paper"))
    status = eval_program.main(
        ["--model", folder, "--benchmarks", "digits", "--out", str(tmp_path / "out")]
    )
    check(status, capsys.readouterr().err, "eval.py", full)


@pytest.mark.parametrize("full", FULL)
def test_training(full, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(loop, "run", full)
    config = str(ROOT / "configs" / "digits.py")
    status = train.main([config, "--workdir", str(tmp_path / "run")])
    check(status, capsys.readouterr().err, "train.py", full)


def test_a_checkpoint_that_does_not_fit_is_not_taken_for_damaged(monkeypatch, tmp_path) -> None:
    with checkpoint.Checkpoints(tmp_path / "run") as kept:
        monkeypatch.setattr(kept._ocp, "CompositeCheckpointHandler", on_a_device)
        with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
            kept._restore(1, {"w": jnp.zeros(2)})


def test_a_file_that_cannot_be_mapped_is_not_taken_for_changed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(np, "memmap", no_map)
    status = cli.main(["ask", str(tiny_model.folder("paper")), "how many 7s are there?"])
    check(status, capsys.readouterr().err, "llava-mini", no_map)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 30021779524 bytes.", "30.02 GB"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB.", "1.61 GB"),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.00G. "
            "That was not possible. There are 1.23G free.; (0x0x0_HBM0)",
            "4.29 GB",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.51G of 15.75G hbm. Exceeded hbm capacity by 4.76G.",
            "22.02 GB",
        ),
    ],
)
def test_what_each_backend_says(text, needed) -> None:
    said = memory_sentence(RuntimeError(text), "try less")
    assert said is not None and said.startswith(f"memory is full: {needed} more are needed, this")
    assert said.endswith("; try less") and "\n" not in said


def test_other_errors_are_not_about_memory() -> None:
    for error in (RuntimeError("INTERNAL: no such device"), KeyError("memory"), ValueError("out")):
        assert memory_sentence(error, "") is None
    assert "jax" in sys.modules
