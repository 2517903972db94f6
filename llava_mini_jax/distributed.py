"""Several processes as one run: how they start, and what their hosts tell each other.

    a value of each process --gather--> all of them on every process, in the order of processes
    an array that lies on devices of several processes --fetch--> the whole of it on every host

`gather` goes over the hosts' CPU devices, which wait for no accelerator: it may be called while a
step is computed. Whatever one process alone sees (a signal, a broken sample, its longest row) goes
through it before anything is decided, so that all processes decide the same. With one process
everything here is the identity.
"""

import functools
import json
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_mini_jax.errors import InputError

NUMBER, ID = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Joins the run's processes; every process calls it before any other use of JAX.

    Slurm, Cloud TPU, Open MPI and Kubernetes tell JAX by themselves who is there. Elsewhere the
    environment says it: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Raises InputError if it does not, or if the others do not come.
    """
    try:
        number, own = (int(os.environ[k]) if k in os.environ else None for k in (NUMBER, ID))
        jax.distributed.initialize(num_processes=number, process_id=own)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of this run cannot be joined ({' '.join(str(error).split()):.300}): "
            f"start it under Slurm, Kubernetes or Cloud TPU, or set JAX_COORDINATOR_ADDRESS, "
            f"{NUMBER} and {ID} for every process; one process alone needs no --distributed"
        ) from error


def stop() -> None:
    """Leaves the run's processes once all have come here: some would miss the first one."""
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: the values of every process, which are of the same shape on all."""
    if jax.process_count() == 1:
        return np.asarray(values)[None]
    mesh = _host_mesh()
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return fetch(jax.make_array_from_process_local_data(split, np.asarray(values)[None]))


def wait_for_all() -> None:
    """Returns once every process has come here."""
    gather(np.zeros((), np.int32))


def gather_json(items: list[Any]) -> list[Any]:
    """The items of all processes, as JSON brings them over, in the order of processes."""
    if jax.process_count() == 1:
        return items
    own = np.frombuffer(json.dumps(items).encode(), np.uint8)
    sizes = gather(np.array([own.size], np.int32))[:, 0]
    texts = gather(np.pad(own, (0, sizes.max() - own.size)))
    read = (json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True))
    return [item for items_of_one in read for item in items_of_one]


def fetch(array: Any) -> np.ndarray:
    """A whole array as numpy, wherever it lies: all processes ask for it, and all get it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated:
            mesh = array.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
            with jax.set_mesh(mesh):
                array = _on_all_devices(mesh)(array)
        return np.asarray(array.addressable_data(0))
    return np.asarray(jax.device_get(array))


@functools.cache
def _host_mesh() -> Mesh:
    """One CPU device of each process, in the order of processes."""
    first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
    return Mesh(np.array([first[i] for i in range(jax.process_count())]), ("process",))


@functools.cache
def _on_all_devices(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
