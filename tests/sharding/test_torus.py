"""Gradients scattered along the axes of a torus: the sums of one reduce-scatter."""

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llava_mini_jax import sharding, torus


@pytest.fixture(params=[(2, 4), (2, 2, 2), (4, 2)], ids=str)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """Eight CPU devices, as if they were a slice of this shape."""
    monkeypatch.setattr(torus, "SLICES", {"cpu": {8: request.param}})
    # Traced programs do not know that the table has changed.
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize(
    "spec", [PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp")], ids=str
)
def test_the_gradient_is_that_of_one_device(shape: tuple[int, ...], spec: PartitionSpec) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=size).astype(np.float32) for size in ((32, 16), (16, 24)))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(x @ sharding.gather(w, x)) ** 2)

    expected = jax.grad(loss)(w, x)
    with jax.set_mesh(sharding.make_mesh(fsdp=8)):
        rows = jax.device_put(x, PartitionSpec("fsdp", None))
        step = jax.jit(jax.grad(loss))
        weight = jax.device_put(w, spec)
        gradient = step(weight, rows)
        text = step.lower(weight, rows).as_text()
    assert gradient.sharding.spec == spec
    assert text.count("reduce_scatter") >= len(shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_slices_of_two_axes_are_known_and_a_ring_is_left_alone() -> None:
    assert torus.dims("TPU v6 lite", 16) == (4, 4)
    assert torus.dims("TPU v5 lite", 64) == (8, 8)
    assert torus.dims("TPU v5 lite", 8) is None
    assert torus.dims("TPU v5", 8) == (2, 2, 2) and torus.dims("TPU v5", 64) is None
    assert torus.dims("NVIDIA H100 80GB HBM3", 16) is None


@pytest.mark.parametrize(
    "coords",
    [
        [(x, y, 0) for x in range(2) for y in range(8)],  # half of a 4 x 8 slice
        [(x, y, 0) for x in range(2) for y in range(4)] * 2,  # two slices
        [(x, y, 0) for x in range(4) for y in range(3)] + [(y, 9, 0) for y in range(4)],
    ],
)
def test_what_is_no_whole_slice_keeps_jax_s_order(coords: list[tuple[int, ...]]) -> None:
    devices = [SimpleNamespace(device_kind="TPU v5 lite", coords=place) for place in coords]
    assert torus.dims("TPU v5 lite", len(devices)) == (4, 4)
    assert torus.ordered(devices) is None


def test_other_meshes_of_a_slice_are_gathered_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torus, "SLICES", {"cpu": {8: (2, 4)}})
    monkeypatch.setattr(torus, "scatter", lambda *_: pytest.fail("not all chips are on fsdp"))
    jax.clear_caches()
    with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
        x = jax.device_put(jnp.ones((8, 16)), PartitionSpec("fsdp", None))
        w = jax.device_put(jnp.ones((16, 24)), PartitionSpec("fsdp", "tensor"))
        jax.jit(jax.grad(lambda w: jnp.sum(x @ sharding.gather(w, x))))(w)
    jax.clear_caches()
