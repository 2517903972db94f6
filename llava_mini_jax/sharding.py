"""The only file that knows the mesh: its axes, and which logical axis lies on which.

    logical axes ("embed", "heads", ...) --RULES--> mesh axes (data, fsdp, tensor) --> PartitionSpec

Model code names logical axes only. Without a mesh (one device, most tests) every function here is
the identity, so the same model code runs unsharded; with `jax.set_mesh(make_mesh(...))` the mesh is
Explicit and JAX checks every annotation while tracing.

- data: replicas of the parameters; batches are split over it.
- fsdp: batches are split over it, and so are parameters, gradients and optimiser state.
- tensor: heads, MLP width and vocabulary are split over it (Megatron-style).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from llava_mini_jax import torus
from llava_mini_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]

# Parameters use the first group, activations the second; `None` = on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "norm": None,  # 0.2 % of a model
    "embed": "fsdp",
    "tower": None,  # its width: frozen, 0.3 B of parameters, and read for every few frames
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "lookup": "data",  # rows of a batch where fsdp lies on the width, as in a table
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; 1 x 1 x 1 runs without a mesh."""

    data: int = 1  # replicas, which divide the rows of a batch
    fsdp: int = 1  # devices that also shard parameters, gradients and optimiser state
    tensor: int = 1  # devices that share the heads and widths of each layer

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Equal parts that the rows of a batch are split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        """ "data=2 fsdp=4": the axes with more than one device, or "none"."""
        sizes = dataclasses.asdict(self).items()
        return " ".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "none"

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """Of "data=1,fsdp=4,tensor=2"; axes left out are 1. Raises InputError for anything else."""
        sizes: dict[str, int] = {}
        for item in text.split(","):
            axis, _, size = item.partition("=")
            known = axis in MESH_AXES and axis not in sizes
            if not known or not size.isdecimal() or int(size) < 1:
                raise InputError(
                    f'a mesh has "{item}"; give axes of {", ".join(MESH_AXES)}, each once, with'
                    " sizes of 1 or more, such as data=1,fsdp=4,tensor=2"
                )
            sizes[axis] = int(size)
        return cls(**sizes)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """An Explicit mesh of data * fsdp * tensor devices (the first ones of `devices` or of all)."""
    needed = data * fsdp * tensor
    devices = list(devices if devices is not None else jax.devices())
    if len(devices) < needed:
        raise InputError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {needed} devices, "
            f"but {len(devices)} are visible: lower an axis or start more devices"
        )
    sizes, explicit = (data, fsdp, tensor), (AxisType.Explicit,) * len(MESH_AXES)
    devices = devices[:needed]
    in_order = torus.ordered(devices) if fsdp == needed else None
    if in_order is not None:
        laid_out = np.asarray(in_order).reshape(sizes)
        return jax.sharding.Mesh(laid_out, MESH_AXES, axis_types=explicit)
    # Sizes by position: JAX 0.11 renamed that argument.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=explicit, devices=devices)


def planned_mesh(mesh: MeshConfig, platform: str | None = None) -> AbstractContextManager:
    """The context of a mesh whose devices need not be there: for plans, not for arrays.

    With `platform` ("gpu", "tpu") programs are traced as they would be for such devices.
    """
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    explicit = (AxisType.Explicit,) * len(MESH_AXES)
    device = platform and AbstractDevice(platform, None, platform)
    planned = AbstractMesh(sizes, MESH_AXES, axis_types=explicit, abstract_device=device)
    return jax.sharding.use_abstract_mesh(planned)


def partition(shape: tuple[int, ...], axes: Axes) -> PartitionSpec | None:
    """PartitionSpec of an array under the current mesh; None without a mesh.

    A dimension that its mesh axes do not divide stays whole on every device: grouped-query
    models have few key/value heads, and a small vocabulary need not be a multiple of anything.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in rank")
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = RULES[axis] if axis is not None else None
        given = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        # Axes of one device are left out: when an array's axis is split in two by a reshape, JAX
        # would lay its second part on them, and the arrays of one operation would disagree.
        names = [name for name in given if mesh.shape[name] > 1]
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(tuple(names) if names and divides else None)
    return PartitionSpec(*spec)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the program that is being traced will run on.

    The current mesh's devices say so, which need not be here (`profile compile`); without a mesh,
    or with one of no devices (`planned_mesh`), JAX's default backend does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def current_mesh() -> jax.sharding.Mesh | None:
    """The mesh of this thread, for another one (`use_mesh`); None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def use_mesh(mesh: jax.sharding.Mesh | None) -> AbstractContextManager:
    """`current_mesh`'s, in this thread."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_mesh() -> bool:
    """Whether arrays may lie in pieces: a mesh of several devices is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def on_one_cpu() -> bool:
    """Whether arrays are computed whole on a CPU: no mesh, and no accelerator."""
    return jax.sharding.get_abstract_mesh().empty and jax.default_backend() == "cpu"


def piece(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """The shape of one device's piece of an array under the current mesh."""
    spec = partition(shape, axes)
    if spec is None:
        return shape
    return NamedSharding(jax.sharding.get_abstract_mesh(), spec).shard_shape(shape)


def placement(shape: tuple[int, ...], axes: Axes) -> list[str]:
    """Words for where each dimension lies under the current mesh: "-", "tensor", "data+fsdp"."""
    spec = partition(shape, axes) or [None] * len(shape)
    return [name if isinstance(name, str) else "+".join(name or "-") for name in spec]


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x` laid out by its logical axes (moves data if it lies otherwise)."""
    spec = partition(x.shape, axes)
    return x if spec is None else jax.reshard(x, spec)


def regroup(x: jax.Array, kept: int, sizes: tuple[int, ...]) -> jax.Array:
    """`x` with its axes behind the first `kept` seen as others, of `sizes`.

    What the first of these axes was split over, the first new one is, if that divides it.
    """
    shape = (*x.shape[:kept], *sizes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x.reshape(shape)
    front = jax.typeof(x).sharding.spec.partitions[: kept + 1]
    parts = math.prod(mesh.shape[axis] for axis in _names(front[kept]))
    split = front[kept] if sizes[0] % parts == 0 else None
    spec = PartitionSpec(*front[:kept], split, *(None,) * (len(sizes) - 1))
    return jnp.reshape(x, shape, out_sharding=spec)


def gather(weight: jax.Array, x: jax.Array, *, learnt: bool = True) -> jax.Array:
    """A weight, whole along fsdp on each device, for products with rows `x` that are split over it.

    Said to the compiler, not left to it: XLA for TPUs would cut such a product into a partial one
    for each device ("windowed einsum": docs/performance.md). As the result is marked
    `reduced`, its gradient stays a sum over each device's own rows until one reduce-scatter. In
    front of a loop both happen once, where the loop would do so every time. Of a weight that is not
    `learnt` no gradient is asked.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    rows = _axes_of(x) & set(RULES["batch"] or ())
    if "fsdp" not in rows or "fsdp" not in _axes_of(weight):
        return weight
    mesh, spec = jax.sharding.get_abstract_mesh(), jax.typeof(weight).sharding.spec
    if not learnt:
        return _gathered(weight, spec, frozenset())
    device = mesh.abstract_device
    shape = torus.dims(device.device_kind, mesh.size) if device else None
    if shape and mesh.shape["fsdp"] == mesh.size:
        return _gathered_on_torus(weight, spec, shape)
    return _gathered(weight, spec, frozenset(rows))


def _gathered(weight: jax.Array, spec: PartitionSpec, rows: frozenset[str]) -> jax.Array:
    kept = (tuple(axis for axis in _names(entry) if axis != "fsdp") for entry in spec.partitions)
    return jax.reshard(weight, PartitionSpec(*(axes or None for axes in kept), reduced=rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered_on_torus(weight: jax.Array, spec: PartitionSpec, shape: tuple[int, ...]) -> jax.Array:
    """`_gathered` on a slice of `shape` that is all fsdp: its gradient goes axis by axis."""
    return _gathered(weight, spec, frozenset({"fsdp"}))


def _gather_on_torus(
    weight: jax.Array, spec: PartitionSpec, shape: tuple[int, ...]
) -> tuple[jax.Array, None]:
    return _gathered_on_torus(weight, spec, shape), None


def _scatter_on_torus(
    spec: PartitionSpec, shape: tuple[int, ...], _: None, sums: jax.Array
) -> tuple[jax.Array]:
    at = next(i for i, entry in enumerate(spec.partitions) if "fsdp" in _names(entry))
    return (torus.scatter(sums, "fsdp", at, spec, shape),)


_gathered_on_torus.defvjp(_gather_on_torus, _scatter_on_torus)


def _axes_of(x: jax.Array) -> set[str]:
    """The mesh axes that an array is split over."""
    return {axis for entry in jax.typeof(x).sharding.spec.partitions for axis in _names(entry)}


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def place(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, which may lie on any other mesh or on none, laid out by its logical axes."""
    spec = partition(x.shape, axes)
    # Local, as jax.devices()[0] belongs to process 0.
    return jax.device_put(x, jax.local_devices()[0] if spec is None else spec)


def settle(tree: Any) -> Any:
    """Without a mesh, arrays bound to the device that they lie on, as restored ones are.

    Unbound ones are another type to jit: a step that got both kinds would be compiled twice.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.device_put(tree, jax.local_devices()[0])


def batch_share() -> tuple[int, int]:
    """(which, of how many) equal parts of a batch's rows lie on this process's devices.

    Processes whose devices differ along the tensor axis alone have the same part.
    """
    if jax.process_count() == 1:
        return 0, 1
    mesh = jax.sharding.get_mesh()
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = partition((rows,), ("batch",))
    assert spec is not None
    parts: dict[int, set[int]] = {}
    # A vector with one entry a part tells which parts lie on which device.
    for device, (span,) in NamedSharding(mesh, spec).devices_indices_map((rows,)).items():
        parts.setdefault(device.process_index, set()).update(range(*span.indices(rows)))
    # A set: processes that differ along the tensor axis alone have the same part.
    shares = sorted({tuple(sorted(part)) for part in parts.values()})
    if sum(map(len, shares)) != rows or len({len(share) for share in shares}) > 1:
        raise InputError(
            f"the mesh {dict(mesh.shape)} gives {jax.process_count()} processes unequal parts of a "
            "batch: make data x fsdp a multiple of the processes, or tensor one of the devices of "
            "a process"
        )
    return shares.index(tuple(sorted(parts[jax.process_index()]))), len(shares)


def put_batch(tree: Any) -> Any:
    """Host arrays onto the devices, first dimension split over the batch axes.

    Each process gives its own rows: those of its `batch_share`.
    """
    _, shares = batch_share()

    def put(x: Any) -> jax.Array:
        # The batch's global shape, of which this process holds one share.
        shape = (x.shape[0] * shares, *x.shape[1:])
        spec = partition(shape, ("batch", *(None,) * (x.ndim - 1)))
        if spec is None:
            return jax.device_put(x)
        placed = NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.make_array_from_process_local_data(placed, x, shape)

    return jax.tree.map(put, tree)


def local(
    function: Callable,
    in_axes: Sequence[Axes],
    out_axes: Axes,
    *arrays: jax.Array,
    opaque: bool = False,
) -> jax.Array:
    """`function(*arrays)` run on every device's own piece: no communication inside.

    For functions in which neither batch rows nor heads mix (attention kernels): inside, arrays are
    plain local arrays, so any kernel fits. The result has the first array's shape.
    `opaque` functions hold kernels of which JAX cannot tell which devices' results are equal.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    in_specs = tuple(partition(a.shape, ax) for a, ax in zip(arrays, in_axes, strict=True))
    out_specs = partition(arrays[0].shape, out_axes)
    # shard_map moves nothing: on an Explicit mesh it refuses what lies otherwise.
    arrays = tuple(jax.reshard(a, s) for a, s in zip(arrays, in_specs, strict=True))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=not opaque)(
        *arrays
    )


def by_rows(function: Callable, *arrays: jax.Array) -> Any:
    """`function(*arrays)` run on every device's own rows: no communication inside.

    For functions in which rows, the first axis of all they take and give, do not mix; whatever
    they sort and reshape, no rule of an Explicit mesh stands in the way.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    specs = tuple(partition(a.shape, ("batch", *(None,) * (a.ndim - 1))) for a in arrays)
    arrays = tuple(jax.reshard(a, s) for a, s in zip(arrays, specs, strict=True))
    assert specs[0] is not None
    rows = PartitionSpec(specs[0].partitions[0])
    return jax.shard_map(function, in_specs=specs, out_specs=rows)(*arrays)
