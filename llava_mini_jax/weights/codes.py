"""Folders whose weights are 4-bit codes, as AWQ and GPTQ leave them: as numbers, or as codes.

    X.qweight, X.qzeros, X.scales (, X.g_idx) --coded--> X.weight, a CodedTensor
                                   read: (code - zero) * scale, whatever dtype is asked for
                                   int4: the codes as they are, put in the order of ops/int4.py

Eight codes lie in an int32, the first in its lowest bits, and weights have inputs first:

    AWQ   qweight [in, out / 8]   outputs 0 2 4 6 1 3 5 7 of a word   zero as it is
    GPTQ  qweight [in / 8, out]   inputs 0 1 2 3 4 5 6 7 of a word    zero less 1 (format "gptq"),
                                                                      or as it is ("gptq_v2")
    both  scales [in / group, out], qzeros [in / group, out / 8] (AWQ's in its order)

As AutoAWQ 0.2.9 (gemm.py, packing_utils.py) and AutoGPTQ 0.7.1 (qlinear_cuda.py) compute it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.ops import int4
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor, contiguous_strides
from llava_mini_jax.weights.codes_config import Coding

_CODES = 8  # in a word
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLES = tuple(range(_CODES))


@dataclasses.dataclass(frozen=True)
class CodedTensor(LazyTensor):
    """X.weight [out, in] that lies on disk as codes; `dtype` is that of its scales."""

    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    coding: Coding

    @property
    def group(self) -> int:
        return self.coding.group or self.shape[1]

    def codes(self, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(codes uint8 [out, in], zeros uint8 [out, G], scales [out, G]) of some outputs."""
        if self.coding.method == "awq":
            codes = _columns(self.qweight, rows, _AWQ_ORDER)
            zeros = _columns(self.qzeros, rows, _AWQ_ORDER)
        else:
            packed = self.qweight.read((slice(None), rows))
            codes = _unpack(packed).transpose(0, 2, 1).reshape(-1, packed.shape[1])
            zeros = _columns(self.qzeros, rows, _NIBBLES)
        zeros = zeros + np.uint8(self.coding.zero_offset)
        return codes.T, zeros.T, self.scales.read((slice(None), rows)).T

    def int4(self) -> int4.Int4Weight:
        """The codes in the order of ops/int4.py, on the host: values [out, S, G] and the rest."""
        codes, zero, scale = self.codes()
        grouped = codes.reshape(len(codes), -1, self.group)
        return int4.Int4Weight(values=int4.pack(grouped), scale=scale, zero=zero)

    def read(
        self,
        index: tuple[slice, ...] = (),
        empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> np.ndarray:
        rows, columns = (*index, slice(None), slice(None))[:2]
        codes, zero, scale = self.codes(slice(*rows.indices(self.shape[0])))
        grouped = codes.astype(np.float32).reshape(len(codes), -1, self.group)
        grouped -= zero[..., None]
        grouped *= scale.astype(np.float32)[..., None]
        part = grouped.reshape(codes.shape)[:, columns]
        array = empty(part.shape, self.dtype)
        array[...] = part
        return array


def _columns(tensor: LazyTensor, wanted: slice, order: tuple[int, ...]) -> np.ndarray:
    """Codes [rows, columns] of words [rows, columns / 8]; code i of a word is column order[i]."""
    start, stop, _ = wanted.indices(tensor.shape[1] * _CODES)
    first, last = start // _CODES, -(-stop // _CODES)
    packed = tensor.read((slice(None), slice(first, last)))
    codes = _unpack(packed)[..., np.argsort(order)].reshape(len(packed), -1)
    return codes[:, start - first * _CODES : stop - first * _CODES]


def _unpack(packed: np.ndarray) -> np.ndarray:
    """uint8 [.., 8] of words [..], from the lowest bits on."""
    found, bits = np.empty((*packed.shape, _CODES), np.uint8), packed.view(np.uint32)
    for place in _NIBBLES:
        found[..., place] = (bits >> np.uint32(4 * place)) & np.uint32(int4.LARGEST)
    return found


# ------------------------------------------------------------------------------- which tensors


def coded(tensors: Mapping[str, LazyTensor], coding: Coding | None) -> dict[str, LazyTensor]:
    """`tensors` with an X.weight in place of every X.qweight and what belongs to it.

    Raises InputError for incomplete, wrong-shaped or contradictory ones. Of large tensors nothing
    is read yet.
    """
    if coding is None:
        return dict(tensors)
    found = dict(tensors)
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    if not modules:
        raise InputError(f"{coding.where} says {coding.method}, but no file holds a .qweight: "
                         "remove the field if the weights are numbers")  # fmt: skip
    for module in modules:
        parts = {
            kind: found.pop(f"{module}.{kind}", None)
            for kind in ("qweight", "qzeros", "scales", "g_idx")
        }
        tensor = _weight(module, parts, coding)
        if tensor.name in found or any(name in module for name in coding.plain):
            raise InputError(
                f"{coding.where}: {module} has codes, but also a weight, or a place in"
                " modules_to_not_convert; which of the two counts cannot be known, so get the"
                " folder again"
            )
        found[tensor.name] = tensor
    return found


def _weight(module: str, parts: dict[str, LazyTensor | None], coding: Coding) -> CodedTensor:
    qweight, qzeros, scales, g_idx = (parts[k] for k in ("qweight", "qzeros", "scales", "g_idx"))
    if qweight is None or qzeros is None or scales is None:
        lacks = next(k for k in ("qzeros", "scales") if parts[k] is None)
        raise InputError(f"{coding.where}: {module}.qweight has no {module}.{lacks}: download "
                         "the rest of the folder")  # fmt: skip
    rows, columns = (*qweight.shape, 0, 0)[:2]
    by_output = coding.method == "awq"
    out, into = (columns * _CODES, rows) if by_output else (columns, rows * _CODES)
    groups = into // (coding.group or max(into, 1))
    wanted = {
        "qweight": (into, out // _CODES) if by_output else (into // _CODES, out),
        "qzeros": (groups, out // _CODES),
        "scales": (groups, out),
        "g_idx": (into,),
    }
    for kind, tensor in parts.items():
        if tensor is not None and (tensor.shape != wanted[kind] or not _is_typed(kind, tensor)):
            raise InputError(
                f"{coding.where}: {module}.{kind} is {tensor.dtype} {tensor.shape}, but codes of"
                f" {out} outputs and {into} inputs in groups of {coding.group or into} need"
                f" {'numbers' if kind == 'scales' else 'int32'} {wanted[kind]}; get the folder"
                " that belongs to this config.json"
            )
    if groups * (coding.group or into) != into or not groups or not out:
        raise InputError(f"{coding.where}: {module} has {into} inputs, which groups of "
                         f"{coding.group} do not divide: that cannot be read")  # fmt: skip
    _check_order(module, g_idx, coding, into)
    tensor = CodedTensor(
        name=f"{module}.weight",
        shape=(out, into),
        dtype=scales.dtype,
        file=qweight.file,
        offset=qweight.offset,
        strides=contiguous_strides((out, into), scales.dtype.itemsize),
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        coding=coding,
    )
    _check_zeros(tensor)
    return tensor


def _is_typed(kind: str, tensor: LazyTensor) -> bool:
    numbers = ("float16", "bfloat16", "float32")
    return tensor.dtype.name in (numbers if kind == "scales" else ("int32",))


def _check_order(module: str, g_idx: LazyTensor | None, coding: Coding, into: int) -> None:
    """InputError unless neighbouring inputs share a scale, as codes are read here."""
    if g_idx is None and not coding.reordered:
        return
    group = coding.group or into
    if g_idx is None or (g_idx.read() != np.arange(into) // group).any():
        raise InputError(
            f"{coding.where}: {module} has its inputs in groups that are not contiguous"
            " (desc_act), which cannot be read; use a version without desc_act"
        )


def _check_zeros(tensor: CodedTensor) -> None:
    """Format "gptq" cannot say the zero 0: tools read the code that it would have in three ways."""
    if tensor.coding.zero_offset and (_unpack(tensor.qzeros.read()) == int4.LARGEST).any():
        raise InputError(
            f"{tensor.coding.where}: {tensor.qzeros.name} has zeros stored as 15, which tools read"
            " as 0 or as 16; use a version in format gptq_v2"
        )
