"""Several processes as one run: how they start, and what their hosts tell each other.

    a value of each process --gather--> all of them on every process, in the order of processes
    an array that lies on devices of several processes --fetch--> the whole of it on every host

`gather` goes over the hosts' CPU devices, which wait for no accelerator: it may be called while a
step is computed. Whatever one process alone sees (a signal, a broken sample, its longest row) goes
through it before anything is decided, so that all processes decide the same. With one process
everything here is the identity.

Whoever waits for the others says so (`waiting`): a thread tells after a minute that it waits, ends
the process when nobody has come for half an hour, and sooner if SIGTERM asks for it, which Python
itself would not hear of before the wait is over.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_mini_jax import environment, signals
from llava_mini_jax.errors import InputError

TOLD_AFTER, GRACE, LONGEST = 60.0, 20.0, 1800.0  # seconds of a wait
TERMINATED = 143  # the status of a process that SIGTERM ends
T = TypeVar("T")

NUMBER, ID = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Joins the run's processes; every process calls it before any other use of JAX.

    Slurm, Cloud TPU, Open MPI and Kubernetes tell JAX by themselves who is there. Elsewhere the
    environment says it: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Raises InputError if it does not, or if the others do not come.
    """
    _check_environment()
    # JAX reads the coordinator's address from the environment, but neither of these.
    number, own = (int(os.environ[k]) if k in os.environ else None for k in (NUMBER, ID))
    try:
        jax.distributed.initialize(num_processes=number, process_id=own)
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        raise InputError(
            f"the processes of this run cannot be joined ({' '.join(str(error).split()):.300}): "
            f"start it under Slurm, Kubernetes or Cloud TPU, or set JAX_COORDINATOR_ADDRESS, "
            f"{NUMBER} and {ID} for every process; one process alone needs no --distributed"
        ) from error
    environment.check_devices()
    threading.Thread(target=_watch, name="waits", daemon=True).start()


_ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")
_NUMBERS = {  # what JAX reads as a number of who starts the processes, and the least it can be
    NUMBER: 1,
    ID: 0,
    "JAX_COORDINATOR_PORT": 1,
    "JAX_PARTITION_INDEX": 0,
    "JAX_SLICE_INDEX": 0,
    "SLURM_JOB_ID": 0,
    "SLURM_NTASKS": 1,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
    "OMPI_COMM_WORLD_SIZE": 1,
    "OMPI_COMM_WORLD_RANK": 0,
    "OMPI_COMM_WORLD_LOCAL_RANK": 0,
    "JOB_COMPLETION_INDEX": 0,
    "TPU_WORKER_ID": 0,
}


def _check_environment() -> None:
    """InputError for a variable that JAX would read and could not use."""
    given = os.environ
    for name in _ADDRESSES:
        host, _, port = (given.get(name) or "host:1").rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise _wrong(name, "host:port of process 0, such as 10.0.0.1:8476")
    for name, least in _NUMBERS.items():
        if name in given and not (re.fullmatch(r" *[0-9]{1,12} *", given[name])):
            raise _wrong(name, "a whole number")
        if name in given and int(given[name]) < least:
            raise _wrong(name, f"{least} or more")
    if NUMBER in given and ID in given and int(given[ID]) >= int(given[NUMBER]):
        raise _wrong(ID, f"0 to {int(given[NUMBER]) - 1}, as {NUMBER} is {given[NUMBER]}")
    if not re.fullmatch(r" *[0-9]+ *(, *[0-9]+ *)*", given.get("JAX_LOCAL_DEVICE_IDS") or "0"):
        raise _wrong("JAX_LOCAL_DEVICE_IDS", "numbers of devices with commas between them")


def _wrong(name: str, expected: str) -> InputError:
    return InputError(
        f'the environment variable {name} is "{os.environ[name]:.80}"; expected {expected}: correct'
        " it on every process, or unset it"
    )


def stop() -> None:
    """Leaves the run's processes once all have come here: some would miss the first one."""
    with waiting("the end of the run"):
        jax.distributed.shutdown()


# --- Waiting --------------------------------------------------------------------------------------

_waits: list[tuple[str, float]] = []  # what is waited for, and since when


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around whatever returns only when other processes have come to it too."""
    wait = (what, time.monotonic())
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


def _watch() -> None:
    """The thread that looks after waits, as long as the process lives."""
    told: tuple[str, float] | None = None
    while True:
        time.sleep(0.2)
        # A slice and not [-1]: the main thread may end its wait between a test and an index.
        wait, stopped = next(iter(_waits[-1:]), None), signals.alarmed()
        if wait is None:
            continue
        what, since = wait
        now, about = time.monotonic(), f"for the other processes ({what})"
        # From the later of the two: a run told to stop still waits for others, with its checkpoint.
        if stopped is not None and now - max(stopped, since) > GRACE:
            _end(f"stopped by SIGTERM after {now - since:.0f} s of waiting {about}", TERMINATED)
        if now - since > LONGEST:
            _end(f"has waited {LONGEST / 60:.0f} minutes {about}, which may hang: see theirs", 1)
        if now - since > TOLD_AFTER and told != wait:
            signals.say(f"process {jax.process_index()} waits {about}; SIGTERM ends it")
            told = wait


def _end(why: str, status: int) -> NoReturn:
    again = "the same command continues from the last checkpoint"
    signals.say(f"{os.path.basename(sys.argv[0])}: process {jax.process_index()} {why}; {again}")
    # Not by an exception: the main thread is inside of a library and would not see it.
    signals.leave(status)


# --- What the processes tell each other -----------------------------------------------------------


def together(work: Callable[[], T]) -> T:
    """What `work` returns here; InputError on all processes where it raises one on any of them."""
    found: Any = None
    problem = ""
    try:
        found = work()
    except InputError as error:
        problem = str(error)
    # With a problem or without: whoever did not come here would leave the others waiting.
    problems = gather_json([[jax.process_index(), problem]] if problem else [])
    if problem:
        raise InputError(problem)
    if problems:
        raise InputError(f"process {problems[0][0]}: {problems[0][1]}")
    return found


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def index() -> int:
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def gather(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: the values of every process, which are of the same shape on all."""
    if jax.process_count() == 1:
        return np.asarray(values)[None]
    mesh = _host_mesh()
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with waiting("what each has to say"):
        return fetch(jax.make_array_from_process_local_data(split, np.asarray(values)[None]))


def wait_for_all() -> None:
    """Returns once every process has come here."""
    gather(np.zeros((), np.int32))


def gather_json(items: list[Any]) -> list[Any]:
    """The items of all processes, as JSON brings them over, in the order of processes."""
    if jax.process_count() == 1:
        return items
    own = np.frombuffer(json.dumps(items).encode(), np.uint8)
    # Lengths first: what is gathered has the same shape on all processes.
    sizes = gather(np.array([own.size], np.int32))[:, 0]
    texts = gather(np.pad(own, (0, sizes.max() - own.size)))
    read = (json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True))
    return [item for items_of_one in read for item in items_of_one]


def fetch(array: Any) -> np.ndarray:
    """A whole array as numpy, wherever it lies: all processes ask for it, and all get it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        with waiting("an array of all of them"):
            return _fetch(array)
    return np.asarray(jax.device_get(array))


def _fetch(array: Any) -> np.ndarray:
    if not array.is_fully_replicated:
        mesh = array.sharding.mesh
        with jax.set_mesh(mesh):
            array = _on_all_devices(mesh)(array)
    return np.asarray(array.addressable_data(0))


@functools.cache
def _host_mesh() -> Mesh:
    """One CPU device of each process, in the order of processes."""
    # Reversed: among equal keys a dict keeps the last, which is then the first device.
    first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
    return Mesh(np.array([first[i] for i in range(jax.process_count())]), ("process",))


# Cached: jit knows functions by identity, and would compile each new lambda again.
@functools.cache
def _on_all_devices(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
