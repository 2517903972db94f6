"""Published tensors into parameters, straight into their device shards.

    folders of LazyTensors --names.py--> plan: which tensor (or part) for which leaf, all checked
                                           |
                           for each leaf: read just the slices that this process's devices hold

Nothing is read before every name and shape has been checked, and then one tensor at a time: host
memory stays near the largest tensor, not the model. A stacked leaf is allocated on the devices and
filled layer by layer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.ops.int4 import Int4Weight
from llava_mini_jax.params import ParamSpec, Tree
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights import mismatch, names
from llava_mini_jax.weights.codes import CodedTensor
from llava_mini_jax.weights.quantize import (
    abstract,
    abstract_int4,
    aligned_empty,
    channel_axes,
    form_of,
    in_decoder,
    int4_specs,
    is_product,
    put,
    quantize,
    quantize_parts,
)
from llava_mini_jax.weights.regroup import regroup

# What weights may be stored as. Integers and 8-bit floats mean something only with scales, which
# may lie in other tensors, other files or nowhere: read as numbers they would be wrong in silence.
NUMBERS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Published:
    """A folder's tensors and the layout that its names follow."""

    where: str
    tensors: Mapping[str, LazyTensor]
    layout: names.Layout


@dataclasses.dataclass(frozen=True)
class Piece:
    """One layer of a leaf (or a whole leaf): a published tensor, or one of its equal parts."""

    tensor: LazyTensor
    part: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.tensor.shape or (1,)
        return (rows // self.parts, *rest) if self.tensor.shape else ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.tensor.dtype.itemsize

    def read(
        self, shape: tuple[int, ...], index: tuple[slice, ...], empty: Callable = np.empty
    ) -> np.ndarray:
        """The slice `index` of this piece seen in our `shape`; `empty` as in LazyTensor.read."""
        theirs = regroup(shape, index, self.shape)
        offset = self.part * self.shape[0] if self.parts > 1 else 0
        if offset:
            theirs = (slice(theirs[0].start + offset, theirs[0].stop + offset), *theirs[1:])
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        return self.tensor.read(theirs, empty).reshape(sizes)


Pieces = dict[str, list[Piece]]


Watch = Callable[[int, int], None]  # is given bytes that are read so far, and in all


def load_params(
    bundle: Bundle,
    folders: Sequence[Published],
    *,
    dtype: Any,
    narrow: str | None = None,
    unrolled: bool,
    watch: Watch = lambda done, total: None,
) -> LlavaMini:
    """Parameters from published folders, with layers stacked (training) or unrolled (inference).

    `narrow`: "int8" or "int4", to which weights of products are rounded (quantize.py); everything
    else is in `dtype`. `watch` is called behind each parameter.
    Raises InputError with the complete list of missing, unexpected and wrong-shaped tensors.
    """
    spec = llava_mini.spec(bundle.model)
    spec = llava_mini.unrolled(spec) if unrolled else spec
    return load_tree(spec, bundle.model, folders, dtype=dtype, narrow=narrow, watch=watch)


def load_tree(
    spec: Tree,
    model: LlavaMiniConfig,
    folders: Sequence[Published],
    *,
    dtype: Any,
    narrow: str | None,
    watch: Watch = lambda done, total: None,
) -> Any:
    """Parameters of a spec tree, or of a part of one whose rest is None."""
    plan = make_plan(spec, model, folders)
    dtype, done = jnp.dtype(dtype), 0
    sizes = {path: sum(piece.nbytes for piece in pieces) for path, pieces in plan.items()}
    total = sum(sizes.values())

    def read(path: str, leaf: ParamSpec) -> jax.Array | Int8Weight | Int4Weight:
        nonlocal done
        found = _assemble(path, leaf, plan[path], dtype, narrow)
        done += sizes[path]
        watch(done, total)
        return found

    return param_tree.map_paths(read, spec)


def shapes(
    bundle: Bundle, folders: Sequence[Published], *, dtype: Any, narrow: str | None = None
) -> LlavaMini:
    """What `load_params` gives, unrolled, as shapes: no weight is read."""
    spec = llava_mini.unrolled(llava_mini.spec(bundle.model))
    plan = make_plan(spec, bundle.model, folders)

    def shape(path: str, leaf: ParamSpec) -> Any:
        if narrow is None or not is_product(path, leaf):
            return param_tree.abstract(leaf, dtype)
        channels = channel_axes(leaf, plan[path][0].shape[0])
        if codes := _kept_codes(path, leaf, plan[path][0].tensor, narrow):
            return abstract_int4(leaf, channels, codes.group, codes.dtype)
        return abstract(path, leaf, channels, narrow, dtype)

    return param_tree.map_paths(shape, spec)


def make_plan(
    spec: Tree, model: LlavaMiniConfig, folders: Sequence[Published], fresh: Sequence[str] = ()
) -> Pieces:
    """Which tensor goes where; earlier folders win where two have one.

    What matches a pattern of `fresh` may be in none. Raises InputError with every problem at once.
    """
    tables = [names.table(folder.layout, model) for folder in folders]
    plan: Pieces = {}
    used: set[tuple[int, str]] = set()
    missing: dict[str, list[str]] = {}
    for path, leaf in param_tree.paths(spec).items():
        absent: set[str] = set()
        for number, (folder, table) in enumerate(zip(folders, tables, strict=True)):
            needed = names.sources(path, leaf, table, model.vision.used_layers)
            if needed is None:
                continue
            used.update((number, s.name) for s in needed)  # of an incomplete set too
            lacks = {s.name for s in needed if s.name not in folder.tensors}
            absent |= lacks
            if not lacks and path not in plan:
                plan[path] = [Piece(folder.tensors[s.name], s.part, s.parts) for s in needed]
        if path not in plan and not param_tree.matches(path, fresh):
            missing[path] = sorted(absent) or ["(no published name)"]
    strange = [
        (folder, name)
        for number, folder in enumerate(folders)
        for name in folder.tensors
        if (number, name) not in used and not _ignored(name, model.llm.tied_head)
    ]
    where = " and ".join(folder.where for folder in folders)
    _refuse_codes(where, plan)
    _refuse_misfits(where, spec, plan, missing, strange)
    return plan


def _refuse_misfits(
    where: str,
    spec: Tree,
    plan: Pieces,
    missing: dict[str, list[str]],
    strange: list[tuple[Published, str]],
) -> None:
    """`missing`: tensors by the path that lacks them; `strange`: those that no path asks for."""
    problems: list[str] = []
    for path, leaf in param_tree.paths(spec).items():
        if lost := missing.get(path):
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            problems.append(f"missing for {path}: {', '.join(lost[:3])}{more}")
        problems += _shape_problems(path, leaf.shape[leaf.stacked :], plan.get(path, []))
    problems += [
        f"unexpected in {folder.where}: {name} {tuple(folder.tensors[name].shape)}"
        for folder, name in strange
    ]
    if problems:
        lost = [name for names_of_path in missing.values() for name in names_of_path]
        raise InputError(
            f"{where}: {len(problems)} tensors do not match the model in config.json:\n  "
            + mismatch.summary(lost, [name for _, name in strange], problems)
            + "\nUse the config.json that belongs to these weights, or download the folder again."
        )


def _ignored(name: str, tied_head: bool) -> bool:
    if any(pattern.fullmatch(name) for pattern in names.IGNORED):
        return True
    # A tied model's file may still hold the head: the same numbers as the embedding table
    # (folders.py has compared them).
    return tied_head and name.endswith("lm_head.weight")


def _refuse_codes(where: str, plan: Pieces) -> None:
    tensors = {piece.tensor.name: piece.tensor for pieces in plan.values() for piece in pieces}
    codes = [tensor for tensor in tensors.values() if tensor.dtype.name not in NUMBERS]
    if codes:
        more = f" (and {len(codes) - 1} more)" if len(codes) > 1 else ""
        raise InputError(
            f"{where}: {codes[0].name}{more} is {codes[0].dtype}, codes of a quantized model and"
            f" not its numbers; give the folder of the original, in {', '.join(NUMBERS[1:])}"
        )


def _shape_problems(path: str, shape: tuple[int, ...], pieces: list[Piece]) -> list[str]:
    problems = []
    for piece in pieces:
        rows = piece.tensor.shape[0] if piece.tensor.shape else 1
        try:
            if rows % piece.parts:
                raise ValueError
            regroup(shape, tuple(slice(0, n) for n in shape), piece.shape)
        except ValueError:
            problems.append(
                f"wrong shape: {piece.tensor.name} is {tuple(piece.tensor.shape)}, "
                f"but {path} needs {shape}" + (f" x {piece.parts}" if piece.parts > 1 else "")
            )
    return problems


def _kept_codes(
    path: str, leaf: ParamSpec, tensor: LazyTensor, narrow: str | None
) -> CodedTensor | None:
    """A published weight whose own codes are taken instead of rounding it once more."""
    kept = narrow == "int4" and in_decoder(path) and not leaf.stacked
    return tensor if kept and isinstance(tensor, CodedTensor) else None


def _assemble(
    path: str, leaf: ParamSpec, pieces: list[Piece], dtype: Any, narrow: str | None
) -> jax.Array | Int8Weight | Int4Weight:
    if narrow is None or not is_product(path, leaf):
        return _whole(leaf, pieces, dtype)
    channels = channel_axes(leaf, pieces[0].shape[0])
    if codes := _kept_codes(path, leaf, pieces[0].tensor, narrow):
        return jax.tree.map(put, codes.int4(), int4_specs(leaf, channels, codes.group))
    form = form_of(path, leaf, channels, narrow)
    assert form is not None
    if sharding.on_one_cpu() and not leaf.stacked:

        def read(rows: slice) -> jax.Array:
            index = (rows, *(slice(0, size) for size in leaf.shape[1:]))
            return jax.device_put(pieces[0].read(leaf.shape, index, _empty(dtype)))

        return quantize_parts(read, leaf.shape, channels, form)
    # Waited for: otherwise the next tensors are read while this one is still there as a float.
    return jax.block_until_ready(quantize(_whole(leaf, pieces, dtype), channels, form))


def _whole(leaf: ParamSpec, pieces: list[Piece], dtype: Any) -> jax.Array:
    if not leaf.stacked:
        return _place(leaf.shape, leaf.axes, pieces[0], dtype)
    spec = sharding.partition(leaf.shape, leaf.axes)
    stacked = jnp.zeros(leaf.shape, dtype, out_sharding=spec)
    for i, piece in enumerate(pieces):
        stacked = _set_layer(stacked, _place(leaf.shape[1:], leaf.axes[1:], piece, dtype), i)
    return stacked


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)


def _place(shape: tuple[int, ...], axes: sharding.Axes, piece: Piece, dtype: Any) -> jax.Array:
    spec = sharding.partition(shape, axes)

    def read(index: Any) -> np.ndarray:
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        return piece.read(shape, index, _empty(dtype))

    if spec is None:
        return jax.device_put(read(tuple(slice(None) for _ in shape)))
    mesh = jax.sharding.get_mesh()
    return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, spec), read)


def _empty(dtype: Any) -> Callable[[tuple[int, ...], Any], np.ndarray]:
    return lambda shape, _: aligned_empty(shape, dtype)
