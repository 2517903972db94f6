"""The one place that decides how a stack of identical layers is run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_POLICIES = jax.checkpoint_policies
ATTENTION = "attention"  # the name under which attention's inputs and results may be kept
# What the backward pass finds of a layer beside its input; everything else it computes again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": _POLICIES.everything_saveable,
    "matmuls": _POLICIES.dots_with_no_batch_dims_saveable,  # products with weights
    "attention": _POLICIES.save_only_these_names(ATTENTION),  # what `attention_name` marks
    "full": _POLICIES.nothing_saveable,
}


def check_remat(remat: str) -> None:
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is unknown; use one of {', '.join(REMAT)}")


def attention_name(x: jax.Array) -> jax.Array:
    """`x` itself: an input or output of attention, which remat "attention" keeps."""
    return checkpoint_name(x, ATTENTION)


def some_layers(layers: Any, first: int, last: int | None) -> Any:
    """Layers first..last - 1 of a stack, stacked or in a tuple; None: up to the last one."""
    if isinstance(layers, tuple):
        return layers[first:last]
    return jax.tree.map(lambda a: a[first:last], layers)


def fold_layers(
    block: Callable[[Any, Any, Any], tuple[Any, Any]],
    layers: Any,
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs `carry, output = block(layer, carry, per_layer[i])` over the stack.

    A stacked tree is scanned: one compiled block, fast compilation (training). A tuple of layers
    is unrolled: no copies of weight slices (decoding; 2.5 times faster on CPU). Both give the same
    numbers. `per_layer` is a tree with a leading layer axis; the outputs come back stacked.
    `remat` names what of a block is kept for the backward pass (REMAT); a layer's input always is.
    """
    check_remat(remat)
    if remat != "none":
        # Inside a loop nothing can undo the recomputation, so its costly prevention is not needed.
        unrolled = isinstance(layers, tuple)
        block = jax.checkpoint(block, prevent_cse=unrolled, policy=REMAT[remat])
    if not isinstance(layers, tuple):
        return jax.lax.scan(lambda c, xs: block(xs[0], c, xs[1]), carry, (layers, per_layer))
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = block(layer, carry, jax.tree.map(lambda a, i=i: a[i], per_layer))
        outputs.append(output)
    # Stacked as a scan stacks them, so that callers need not know which of the two ran.
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)
