"""Parameters as data: one spec tree per model, everything else derived from it.

    spec(cfg)  a flax.struct dataclass filled with ParamSpec(shape, logical axes, initializer)
       |-- init(key, spec)        arrays, created in their shards
       |-- abstract(spec)         ShapeDtypeStructs with shardings: nothing is allocated
       |-- paths(tree)            {"llm/layers/q_proj": leaf, ...}
       '-- split / merge          by path pattern: frozen and trainable parts, checkpoints

A stack of n identical layers is one tree whose leaves have a leading axis of n.
"""

import dataclasses
import fnmatch
import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding

Array = jax.Array
Leaf = Any  # a struct's field: a device or host array; in a spec tree, a ParamSpec
Tree = Any
Initializer = Callable[[Array, tuple[int, ...], Any], Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


def torch_linear(fan_in: int) -> Initializer:
    """torch.nn.Linear's default for kernel and bias: uniform within 1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension, its initializer.

    JAX does not know the class, so it is a leaf of every tree.
    """

    shape: tuple[int, ...]
    axes: sharding.Axes
    init: Initializer

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")

    @property
    def stacked(self) -> bool:
        """Whether the first axis is that of the layers."""
        return self.axes[:1] == ("layers",)

    @property
    def output_axes(self) -> int:
        """Of a weight of products: how many of its first axes are layers and output features.

        Where heads stand first, their width is one too: two of [N, H, D], one of [D, N, H].
        """
        wide = self.axes[self.stacked] == "heads" and len(self.shape) - self.stacked > 2
        return self.stacked + (2 if wide else 1)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def stack(count: int, spec: Tree) -> Tree:
    """The spec of `count` identical layers in one tree: every shape gets a leading `count`.

    The initializer stays that of one layer.
    """
    return jax.tree.map(lambda s: ParamSpec((count, *s.shape), ("layers", *s.axes), s.init), spec)


def unstack(layers: Any) -> tuple:
    """A stacked tree, of arrays or of specs, as a tuple of layers: what `fold_layers` unrolls."""
    if isinstance(layers, tuple):
        return layers

    def take(leaf: Any, i: int) -> Any:
        return ParamSpec(leaf.shape[1:], leaf.axes[1:], leaf.init) if is_spec(leaf) else leaf[i]

    depth = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda a, i=i: take(a, i), layers) for i in range(depth))


def paths(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in tree order: {"projector/fc1/kernel": leaf, ...}."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def map_paths(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`function(path, leaf, *leaves of rest)` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *rest,
    )


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches a pattern: "vision/*" everything below, "*/bias" every bias."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def split(tree: Tree, selected: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(selected, others): the same tree twice, with None where the leaf went to the other one.

    None is an empty subtree for JAX, so gradients and optimiser state of the first tree simply do
    not exist for the leaves of the second.
    """
    first = map_paths(lambda path, leaf: leaf if selected(path) else None, tree)
    second = map_paths(lambda path, leaf: None if selected(path) else leaf, tree)
    return first, second


def merge(first: Tree, second: Tree) -> Tree:
    """The inverse of `split`."""
    # None counts as a leaf: as an empty subtree it would make the two trees differ.
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


def init(key: Array, spec: Tree, dtype: Any = jnp.float32) -> Tree:
    """Fresh arrays for a spec tree, each created in its own shards under the current mesh.

    Every parameter's key comes from its path and layer number: adding a component changes no
    other, and stacked and unrolled layers begin with the same numbers.
    """
    shardings = [s.sharding for s in paths(abstract(spec, dtype)).values()]
    items = paths(spec)

    def create(key: Array) -> list[Array]:
        return [_create(key, path, s, dtype) for path, s in items.items()]

    placed = None if jax.sharding.get_abstract_mesh().empty else shardings
    arrays = jax.jit(create, out_shardings=placed)(key)
    return jax.tree.unflatten(jax.tree.structure(spec), arrays)


def _create(key: Array, path: str, spec: ParamSpec, dtype: Any) -> Array:
    numbered = re.fullmatch(r"(.*?)/(\d+)/(.*)", path)
    # Without its number: layer i of a stack and layer i of a tuple begin with the same key.
    name = f"{numbered[1]}/{numbered[3]}" if numbered else path
    # Not `hash`, which Python salts anew in every process.
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if not spec.stacked:
        key = jax.random.fold_in(key, int(numbered[2])) if numbered else key
        return spec.init(key, spec.shape, dtype)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(spec.shape[0]))
    # Layer by layer: one draw of the whole stack would give other numbers than a tuple's.
    return jax.vmap(lambda k: spec.init(k, spec.shape[1:], dtype))(keys)


def abstract(spec: Tree, dtype: Any = jnp.float32) -> Tree:
    """The spec as ShapeDtypeStructs with their shardings: no memory is allocated."""

    def one(s: ParamSpec) -> jax.ShapeDtypeStruct:
        mesh = jax.sharding.get_abstract_mesh()
        placed = sharding.partition(s.shape, s.axes)
        if placed is None:
            return jax.ShapeDtypeStruct(s.shape, dtype)
        return jax.ShapeDtypeStruct(s.shape, dtype, sharding=jax.NamedSharding(mesh, placed))

    return jax.tree.map(one, spec)


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays, specs or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in paths(tree).values())
