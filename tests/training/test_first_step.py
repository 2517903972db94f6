"""The step that is compiled while a stage starts is the one that it takes."""

import dataclasses
import threading
from collections.abc import Iterator

import jax
import pytest

from llava_mini_jax import compilation
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import first_step, loop
from llava_mini_jax.training.stages import TrainConfig
from tests import tiny
from tests.training import one_stage

fast_compilation = tiny.fast_compilation


@pytest.fixture
def compiled(monkeypatch) -> Iterator[list[str]]:
    """The threads that have compiled a step."""
    monkeypatch.setattr(compilation, "threads_pay", lambda: True)
    threads: list[str] = []

    def heard(event: str, _: float, **about) -> None:
        step = about.get("fun_name") == "jit(train_step)"
        if step and event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.current_thread().name)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(heard)
    yield threads
    jax.monitoring.unregister_event_duration_listener(heard)


def stage(**changes) -> TrainConfig:
    return dataclasses.replace(one_stage.config(), checkpoint_every=1, **changes)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), pytest.param(MeshConfig(fsdp=2), marks=pytest.mark.slow)], ids=str
)
def test_a_fresh_run_and_a_continued_one(compiled, tmp_path, mesh) -> None:
    loop.run([stage(steps=2, mesh=mesh)], str(tmp_path))
    assert len(compiled) == 1 and compiled[0] != "MainThread"
    compiled.clear()
    jax.clear_caches()
    (tmp_path / "stage2" / "model").rename(tmp_path / "before")
    newest = tmp_path / "checkpoints" / "stage2" / "2"
    newest.rename(tmp_path / "newest")
    loop.run([stage(steps=2, mesh=mesh)], str(tmp_path))
    assert len(compiled) == 1 and compiled[0] != "MainThread"


def test_a_batch_of_another_size_waits_for_nothing(compiled, tmp_path) -> None:
    loop.run([stage(steps=1, lengths=(96, 2048))], str(tmp_path))
    assert "MainThread" in compiled


def test_what_fails_in_the_thread_is_told_by_the_step(compiled, monkeypatch, tmp_path) -> None:
    class Broken:
        def compile(self) -> None:
            raise RuntimeError("RESOURCE_EXHAUSTED")

    first_step._compile(Broken())
    monkeypatch.setattr(compilation, "threads_pay", lambda: False)
    loop.run([stage(steps=1)], str(tmp_path))
    assert compiled == ["MainThread"]
