"""Jobs run as processes, a few at a time, each on cores of its own; what is done is not repeated.

    Jobs's jobs --those that are not done--> processes: loop.run, then evaluate --> workdir/
                                                                  progress, lines of what came out

A run that is stopped (Ctrl-C) leaves checkpoints and answers; the same command goes on from them.
"""

import contextlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from etils import epath

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import find
from llava_mini_jax.reproduce.scales import Job
from llava_mini_jax.terminal import counting
from llava_mini_jax.training.workdir import changed_fields

_POLL_SECONDS = 0.5
# glibc gives big temporaries back after each step, and pays for their pages in the next one.
_KEEP_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


def run(
    jobs: Mapping[str, Job], out: Path, *, workers: int, data: Path, limit: int | None = None
) -> None:
    """All jobs that are not done, `workers` at a time; `limit` questions of each benchmark.

    Where one fails, those that do not need it go on; then InputError with the end of its log.
    """
    check_same(jobs, out, limit)
    waiting = [job for job in jobs.values() if not job.is_done(out)]
    for name in {name for job in waiting for name in job.benchmarks}:
        benchmark = find(name)
        benchmark.questions(data / benchmark.folder)  # what is missing is said before training
    crew = _Crew(out, data, limit, workers)
    left, running = {job.name: job for job in waiting}, dict[Future[str], Job]()
    failed: list[str] = []
    total = sum(job.steps for job in waiting)
    with (
        _unwound_by_sigterm(),
        ThreadPoolExecutor(workers) as pool,
        counting("steps of training", total) as bar,
    ):
        try:
            while left or running:
                # Nobody waits for another's end while there is something to do.
                pending = {*left, *(job.name for job in running.values())}
                ready = [job for job in left.values() if job.needs not in pending]
                for job in ready[: workers - len(running)]:
                    running[pool.submit(crew.work, left.pop(job.name))] = job
                ended, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                bar(completed=sum(_steps_done(job, out) for job in waiting))
                for future in ended:
                    job = running.pop(future)
                    try:
                        print(future.result(), flush=True)
                    except InputError as error:
                        failed.append(str(error))
                        _drop(left, job.name)
        finally:
            # No new jobs first; then the processes, which the pool's threads wait for.
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()
    if failed:
        raise InputError("; ".join(failed))


def _drop(left: dict[str, Job], name: str) -> None:
    """Without those that need a job, or one of these."""
    for other in [job.name for job in left.values() if job.needs == name]:
        del left[other]
        _drop(left, other)


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """A scheduler's signal ends the run as Ctrl-C does: no process of it is left behind."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the processes are given time to end
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_same(jobs: Mapping[str, Job], out: Path, limit: int | None) -> None:
    """Raises InputError where a folder holds a run of other settings: a trial, say."""
    for job in jobs.values():
        changed = changed_fields(epath.Path(out / job.name), job.stages) if job.stages else []
        results = job.results(out)
        if results.exists():
            for found in json.loads(results.read_text()):
                changed += ["limit"] * (found["settings"]["limit"] != limit)
                if job.vision_tokens is not None and job.vision_tokens != _count(found):
                    changed.append("vision tokens")
        if changed:
            raise InputError(
                f"{out / job.name} holds a run with other settings ({', '.join(changed[:3])}): give"
                " another --out, or remove it to run it again"
            )


def _count(result: dict[str, Any]) -> int | None:
    """The number of vision tokens that answers were asked with, of a model that has several."""
    return result["settings"]["model"]["model"]["compressor"].get("count")


class _Crew:
    """Processes that work on jobs, and the cores that are free for the next one."""

    def __init__(self, out: Path, data: Path, limit: int | None, workers: int):
        self._given = (out, data, limit)
        # Rows are many and small: most of what they compile, one of them has compiled before.
        self._environment = {
            **_KEEP_HEAP,
            "JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "compiled"),
        }
        if workers > 1:  # processes cannot share an accelerator: each would take all its memory
            self._environment["JAX_PLATFORMS"] = "cpu"
        self._cores: queue.Queue[set[int]] = queue.Queue()
        for share in _shares(workers):
            self._cores.put(share)
        self._lock = threading.Lock()
        self._processes: set[BaseProcess] | None = set()  # None: it is over

    def work(self, job: Job) -> str:
        """Does a job; a line about it."""
        cores, began = self._cores.get(), time.monotonic()
        try:
            self._one(job, cores)
        finally:
            self._cores.put(cores)
        found = scores_of(job, self._given[0])
        scores = "".join(f"{found[name]:.1f}, " for name in job.benchmarks if name in found)
        return f"{job.name}: {scores}{time.monotonic() - began:.0f} s"

    def _one(self, job: Job, cores: set[int]) -> None:
        # Not forked: a child would have JAX's locks without the threads that release them.
        process = multiprocessing.get_context("spawn").Process(
            target=_do, args=(job, *self._given, cores), name=job.name
        )
        with self._lock:
            if self._processes is None:
                raise InputError(f"{job.name} was not started: the run is over")
            self._processes.add(process)
            # Under the lock: the environment is that of this whole process.
            with _defaults(self._environment):
                process.start()
        process.join()
        if process.exitcode:
            log = self._given[0] / job.name / "log.txt"
            raise InputError(f"{job.name} failed: {_why(process.exitcode, log)} (its log: {log})")

    def stop(self) -> None:
        """Ends what still runs; training leaves a checkpoint."""
        with self._lock:
            processes, self._processes = self._processes or set(), None
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _why(exitcode: int, log: Path) -> str:
    if exitcode < 0:  # it had no time for a word
        name = signal.Signals(-exitcode).name
        hint = ", as is done where memory runs out" if name == "SIGKILL" else ""
        return f"it was ended by {name}{hint}"
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def _defaults(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a process that starts here, where the user has not set them."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _do(job: Job, out: Path, data: Path, limit: int | None, cores: set[int]) -> None:
    """One job, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us
    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    # By descriptors: what libraries print from C++ goes there, too.
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if cores:
        # Before JAX starts: its threads are as many as the cores that it may use.
        os.sched_setaffinity(0, cores)
    from llava_mini_jax.evaluation.run import evaluate
    from llava_mini_jax.training import loop

    try:
        if job.stages:
            loop.run(job.stages, str(folder))
        if job.benchmarks:
            command = evaluate.Command(
                models=(str(job.model(out)),),
                benchmarks=job.benchmarks,
                data=data,
                out=job.results(out).parent,
                limit=limit,
                batch_size=32,
                vision_tokens=job.vision_tokens,
            )
            evaluate.evaluate(command)
    except loop.Stopped as stopped:
        sys.exit(f"{stopped}; the same command continues there")
    except InputError as error:
        sys.exit(str(error))


def _shares(workers: int) -> list[set[int]]:
    """The cores of this process, shared out; empty sets where there are too few, or none known."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        return [set()] * workers
    return [set(cores[i::workers]) for i in range(workers)]


def _steps_done(job: Job, out: Path) -> int:
    path = out / job.name / "metrics.jsonl"
    if not path.exists():
        return 0
    steps = dict.fromkeys((stage.name for stage in job.stages), 0)
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            steps[line["stage"]] = max(steps[line["stage"]], line["step"])
        except (ValueError, KeyError, TypeError):  # a line that is being written
            continue
    return sum(steps.values())


def scores_of(job: Job, out: Path) -> dict[str, float]:
    """The job's scores by benchmark and by kind of question; none as long as it has no results."""
    path = job.results(out)
    if not job.benchmarks or not path.exists():
        return {}
    scores: dict[str, float] = {}
    for result in json.loads(path.read_text()):
        scores |= result["rules"][result["headline"]]["details"].get("parts", {})
        scores[result["benchmark"]] = result["value"]
    return {name: value for name, value in scores.items() if value is not None}
