"""AdamW with learning rates by parameter path, warm-up and cosine decay (paper table 9)."""

import dataclasses
from collections.abc import Hashable

import jax.numpy as jnp
import numpy as np
import optax

from llava_mini_jax import params as param_tree
from llava_mini_jax.params import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters whose path matches `patterns` have their own peak learning rate."""

    patterns: tuple[str, ...]
    learning_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float  # peak, of every parameter that is in no group
    groups: tuple[Group, ...]  # own learning rates; the first group that matches a path applies
    warmup_ratio: float  # share of the steps; 0: no warm-up
    weight_decay: float  # on kernels and tables, never on norms and biases
    max_grad_norm: float  # gradients are clipped to this norm; 0: no clipping
    beta1: float
    beta2: float
    eps: float
    # Dtype of Adam's first moment: "bfloat16" saves two bytes a parameter. The second moment is
    # always float32: in bfloat16 it would never fall, because 0.999 of it rounds back to it.
    first_moment_dtype: str = "float32"


def make_optimizer(
    cfg: OptimizerConfig, steps: int, trainable: Tree
) -> optax.GradientTransformation:
    """The transformation for a run of `steps` steps over `trainable` (None where frozen)."""
    labels = param_tree.map_paths(lambda path, _: _group_of(path, cfg.groups), trainable)
    decayed = param_tree.map_paths(lambda path, leaf: _decays(path), trainable)
    peaks = [group.learning_rate for group in cfg.groups] + [cfg.learning_rate]
    rates: dict[Hashable, optax.GradientTransformation] = {
        index: optax.scale_by_learning_rate(schedule(peak, cfg.warmup_ratio, steps))
        for index, peak in enumerate(peaks)
    }
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps, mu_dtype=cfg.first_moment_dtype)
    # AdamW's order: decay joins behind Adam, whose moments never see it.
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity(),
        _in_float32(adam),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        # Groups differ in rate alone: one norm clips them all.
        optax.partition(rates, labels),
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for float32 parameters and gradients: optax makes moments in the dtype of these."""

    def init(params: Tree) -> Tree:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return inner.update(optax.tree.cast(updates, jnp.float32), state)

    return optax.GradientTransformation(init, update)


def schedule(peak: float, warmup_ratio: float, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_ratio` of the steps, then cosine decay to zero."""
    if warmup_ratio == 0:
        return optax.cosine_decay_schedule(peak, steps)
    warmup = max(1, round(warmup_ratio * steps))
    # optax wants at least one step of decay behind the warm-up.
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def learning_rates(cfg: OptimizerConfig, steps: int, step: int) -> dict[str, float]:
    """The rate of step `step` (from 1), and that of each group, if no step before was skipped."""
    named = {"learning_rate": cfg.learning_rate}
    named |= {f"learning_rate {','.join(g.patterns)}": g.learning_rate for g in cfg.groups}
    return {
        # optax counts steps from 0.
        name: float(np.asarray(schedule(peak, cfg.warmup_ratio, steps)(step - 1)))
        for name, peak in named.items()
    }


def _group_of(path: str, groups: tuple[Group, ...]) -> int:
    matching = (i for i, group in enumerate(groups) if param_tree.matches(path, group.patterns))
    return next(matching, len(groups))


def _decays(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name not in ("bias", "scale") and not name.endswith("norm")
