"""Every compared compressor: eight devices give one device's loss and gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.cost.flops import shape_of, step_flops
from tests import tiny
from tests.sharding.test_one_and_eight import GRADIENT_RTOL, LOSS_ATOL, place
from tests.tiny_compressors import METHODS

fast_compilation = tiny.fast_compilation

# Gradients of order 1e-2; those that are zero but for rounding are not looked at closer.
GRADIENT_ATOL = 1e-6

# What stays of a row is gathered and put back: other operations than those of a mask.
DROPPED = dataclasses.replace(METHODS["fastv"], variant="drop")
CASES = METHODS | {"fastv, dropped": DROPPED}
QUICK = {"prumerge", "voco", "fastv"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_loss_and_gradients(name: str) -> None:
    cfg = tiny.model("paper", compressor=CASES[name], prefusion_layers=0)
    batch, trained = tiny.training_batch(cfg), ("compressor/*", "llm/*")
    loss, grads = tiny.loss_and_grads(tiny.weights(cfg), batch, cfg)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        placed = sharding.put_batch(batch)
        found_loss, found = tiny.loss_and_grads(place(tiny.weights(cfg), cfg), placed, cfg)
        # Counted of all devices together, from a trace that knows no mesh.
        of_mesh = step_flops.__wrapped__(cfg, trained, shape_of(batch))
    assert float(found_loss) == pytest.approx(float(loss), abs=LOSS_ATOL)
    expected = param_tree.paths(grads)
    for path, gradient in param_tree.paths(found).items():
        atol = GRADIENT_ATOL + GRADIENT_RTOL * np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], atol=atol, err_msg=path)
    assert of_mesh == step_flops(cfg, trained, shape_of(batch))
