"""Logical axes to mesh axes: what is split, what stays whole, and what happens without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from llava_mini_jax import sharding


def test_without_a_mesh_everything_is_the_identity() -> None:
    x = jnp.ones((2, 3))
    assert sharding.partition((2, 3), ("batch", None)) is None
    assert sharding.constrain(x, ("batch", None)) is x
    assert sharding.local(jnp.sin, [("batch", None)], ("batch", None), x).shape == (2, 3)
    assert sharding.put_batch({"a": np.ones(3)})["a"].sharding.is_fully_replicated


def test_the_mesh_has_three_explicit_axes() -> None:
    mesh = sharding.make_mesh(2, 1, 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sharding.make_mesh(devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


def test_too_few_devices() -> None:
    with pytest.raises(ValueError, match="data=4 x fsdp=2 x tensor=2 needs 16 devices, but 8"):
        sharding.make_mesh(4, 2, 2)


@pytest.mark.parametrize(
    ("mesh", "shape", "axes", "expected"),
    [
        ((2, 2, 2), (8, 5, 6), ("batch", None, "heads"), (("data", "fsdp"), None, "tensor")),
        ((2, 2, 2), (6, 5, 6), ("batch", None, "heads"), (None, None, "tensor")),
        ((2, 2, 2), (64, 33), ("vocab", "embed"), ("tensor", None)),
        ((2, 2, 2), (2, 7), ("layers", "norm"), (None, None)),
        # Axes of one device are left out, so that arrays of one batch agree after reshapes.
        ((8, 1, 1), (8, 6), ("batch", "heads"), ("data", None)),
        ((1, 4, 2), (8, 6), ("batch", "heads"), ("fsdp", "tensor")),
        ((1, 1, 1), (8, 6), ("batch", "heads"), (None, None)),
    ],
    ids=str,
)
def test_partition(mesh, shape, axes, expected) -> None:
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        assert sharding.partition(shape, axes) == PartitionSpec(*expected)


def test_axes_of_another_rank_and_unknown_ones() -> None:
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        with pytest.raises(ValueError, match="differ in rank"):
            sharding.partition((2, 3), ("batch",))
        with pytest.raises(KeyError, match="no such axis"):
            sharding.partition((2,), ("no such axis",))


def test_batches_are_split_by_rows_and_attention_runs_on_pieces() -> None:
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        batch = sharding.put_batch({"x": rows, "odd": rows[:3]})
        assert batch["x"].addressable_shards[0].data.shape == (2, 3)
        assert batch["odd"].addressable_shards[0].data.shape == (3, 3)
        seen = []

        def double(piece: jax.Array) -> jax.Array:
            seen.append(piece.shape)
            return 2 * piece

        axes = ("batch", None)
        found = sharding.local(double, [axes], axes, batch["x"])
        assert seen[-1] == (2, 3)
        np.testing.assert_array_equal(found, 2 * rows)
        whole = sharding.constrain(batch["x"], (None, None))
        assert whole.sharding.is_fully_replicated
