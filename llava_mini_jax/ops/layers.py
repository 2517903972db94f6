"""The one place that decides how a stack of identical layers is run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_layers(
    block: Callable[[Any, Any, Any], tuple[Any, Any]],
    layers: Any,
    carry: Any,
    per_layer: Any = None,
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Runs `carry, output = block(layer, carry, per_layer[i])` over the stack.

    A stacked tree is scanned: one compiled block, fast compilation (training). A tuple of layers
    is unrolled: no copies of weight slices (decoding; 2.5 times faster on CPU). Both give the same
    numbers. `per_layer` is a tree with a leading layer axis; the outputs come back stacked.
    `remat` recomputes each block in the backward pass instead of keeping its activations.
    """
    block = jax.checkpoint(block) if remat else block
    if not isinstance(layers, tuple):
        return jax.lax.scan(lambda c, xs: block(xs[0], c, xs[1]), carry, (layers, per_layer))
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = block(layer, carry, jax.tree.map(lambda a, i=i: a[i], per_layer))
        outputs.append(output)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)
