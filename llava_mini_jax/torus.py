"""The torus that the chips of a TPU slice are wired as, and sums scattered along its axes.

    kind, count --dims--> (4, 4) --ordered--> the slice's devices, row by row
    sums of 16 devices --scatter--> along one axis in rings of 4, then along the other

libtpu 0.0.42.1 makes a reduce-scatter of a ring only. Of sums over a whole slice of two axes it
makes an all-reduce and a slice of it: twice the bytes, and nothing else runs meanwhile. In one
phase an axis it scatters, whatever mesh axis the devices form (docs/performance.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

# By `device_kind`, slices of more than one ring, of which there is one of that size. (Larger ones
# of three axes, v5p's, have several shapes.)
_FLAT = {16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBE = {8: (2, 2, 2)}
SLICES = {
    **{"TPU v5 lite": _FLAT, "TPU v5e": _FLAT, "TPU v6 lite": _FLAT, "TPU v6e": _FLAT},
    **{"TPU v5": _CUBE, "TPU v5p": _CUBE},
}


def dims(kind: str, devices: int) -> tuple[int, ...] | None:
    """Chips along each axis of a slice; None where it is one ring, or not known."""
    return SLICES.get(kind, {}).get(devices)


def ordered(devices: Sequence[Any]) -> list[Any] | None:
    """All devices of a slice so that neighbours on its last axis stand together; None where they
    are no whole slice of a known shape: a part of a larger one, or of several.

    JAX alone would lay one mesh axis on a ring through all chips of a 4 x 4 slice, whose parts are
    no rings.
    """
    shape = dims(devices[0].device_kind, len(devices))
    places = {tuple(getattr(device, "coords", ())) for device in devices}
    spans = sorted(max(axis) - min(axis) + 1 for axis in zip(*places, strict=True))
    if shape is None or len(places) < len(devices) or [n for n in spans if n > 1] != sorted(shape):
        return None
    return list(mesh_utils.create_device_mesh(shape, devices=devices).ravel())


def scatter(
    sums: jax.Array, axis: str, at: int, into: PartitionSpec, shape: tuple[int, ...]
) -> jax.Array:
    """`sums`, unreduced over mesh axis `axis` of a slice of `shape`, added up, and cut along `at`.

    Their numbers are those of one reduce-scatter but for the order in which they are added.
    """
    places = np.arange(math.prod(shape)).reshape(shape)
    phases = [
        np.moveaxis(places, along, -1).reshape(-1, shape[along]).tolist()
        for along in range(len(shape))
    ]

    def of_one_device(part: jax.Array) -> jax.Array:
        for rings in phases:
            part = jax.lax.psum_scatter(
                part, axis, scatter_dimension=at, tiled=True, axis_index_groups=rings
            )
        return part

    # JAX has no rule for groups that says which devices' results are equal; none are here.
    inside = jax.shard_map(
        of_one_device,
        in_specs=jax.typeof(sums).sharding.spec,
        out_specs=into,
        check_vma=False,
    )
    return inside(sums)
