"""The pickle inside a torch weight file: what its names mean, and the tensors that it describes.

    pickle --inert_pickle--> names, looked up in NAMES --> {name: TorchTensor}
                             ("torch.FloatStorage",         a storage's key, an offset, a shape and
                              "torch._utils._rebuild_..")   strides, checked to stay in the storage

None of torch's functions is here: a name stands for itself, or for a function of this file that
checks its arguments and returns a record. `torch_bin` finds the storages in the file.
"""

from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llava_mini_jax.errors import short
from llava_mini_jax.tensorfiles import safetensors_header
from llava_mini_jax.tensorfiles.inert_pickle import BadPickleError, Name, read_pickle
from llava_mini_jax.tensorfiles.lazy_tensor import shape_problem

STORAGES: dict[str, np.dtype | None] = {  # None: bytes, whose meaning the tensor states
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": None,
}
# torch's words are numpy's.
DTYPES = {f"torch.{dtype.name}": dtype for dtype in safetensors_header.DTYPES.values()}
NESTED_UNDER = ("state_dict", "model")  # where training scripts put the weights
STATE_DICT_ONLY = (
    "save only the weights (model.state_dict()) with torch.save, or better as safetensors."
)


@dataclass(frozen=True)
class TorchStorage:
    """A run of bytes that tensors share, by its key in the file."""

    key: str
    dtype: np.dtype | None
    nbytes: int


@dataclass(frozen=True)
class TorchTensor:
    """A view of a storage; its elements lie within the bytes that the storage states."""

    storage: TorchStorage
    dtype: np.dtype
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(stream: BinaryIO) -> tuple[dict[str, TorchTensor], dict[str, TorchStorage]]:
    """The tensors of one pickle by name, and every storage that it mentions by key.

    Raises BadPickleError for all but a dict of tensors, or one under "state_dict" or "model".
    """
    storages: dict[str, TorchStorage] = {}

    def remembered(identity: object) -> TorchStorage:
        storage = _storage(identity)
        storages.setdefault(storage.key, storage)
        return storage

    return _state_dict(read_pickle(stream, NAMES, remembered)), storages


def read_plain(stream: BinaryIO) -> Any:
    """The value of one pickle that holds neither names nor storages."""

    def refused(identity: object) -> None:
        raise BadPickleError(f"names the storage {short(identity)} outside of its tensors")

    return read_pickle(stream, {}, refused)


def _storage(identity: object) -> TorchStorage:
    """A storage, from the tuple by which torch names it: its kind, key and number of elements."""
    match identity:
        case ("storage", Name(text=kind), str(key), str() | None, int(count), *view) if (
            kind in STORAGES and count >= 0 and view in ([], [None]) and key.isprintable()
        ):
            dtype = STORAGES[kind]
            return TorchStorage(key, dtype, count * (1 if dtype is None else dtype.itemsize))
    raise BadPickleError(f"describes a storage as {short(identity)}, unlike torch.save")


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> TorchTensor:
    """torch._utils._rebuild_tensor, and the core of its siblings."""
    if dtype is None and isinstance(storage, TorchStorage):
        dtype = storage.dtype
    if dtype is None or not isinstance(storage, TorchStorage):
        raise BadPickleError(
            f"builds a tensor on {short(storage)}, not on a storage of known dtype"
        )
    if problem := shape_problem(shape, dtype.itemsize):
        raise BadPickleError(f"holds a tensor, but {problem}")
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        raise BadPickleError(f"holds a tensor of shape {shape} with strides {short(strides)}")
    if not all(type(number) is int and number >= 0 for number in (offset, *strides)):
        raise BadPickleError(
            f"holds a tensor with offset {short(offset)}, strides {short(strides)}"
        )
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise BadPickleError(
            f"holds a tensor of shape {shape}, offset {offset} and strides {strides} that reaches "
            f"beyond its storage of {storage.nbytes:,} bytes"
        )
    # The stride of an axis of one element is never used, and torch writes any number there.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return TorchTensor(storage, dtype, offset, tuple(shape), strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, lazy: Any = None
) -> TorchTensor:
    _refuse_lazy_values(lazy)
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    lazy: Any = None,
) -> TorchTensor:
    _refuse_lazy_values(lazy)
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise BadPickleError(f"holds a tensor of dtype {short(dtype)}, unlike torch.save")
    return _tensor(storage, offset, shape, strides, DTYPES[dtype.text])


def _refuse_lazy_values(lazy: Any) -> None:
    """torch notes here that the stored values are still to be negated or conjugated."""
    if lazy:
        raise BadPickleError(f"holds a tensor with pending changes {short(lazy)}", STATE_DICT_ONLY)


def _parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> TorchTensor:
    if not isinstance(data, TorchTensor):
        raise BadPickleError(f"wraps {short(data)} as a parameter, which is not a tensor")
    return data


def _size(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple):
        raise BadPickleError(f"holds a torch.Size of {short(sizes)}")
    return sizes


def _empty_dict() -> dict[str, Any]:
    return {}


def _device(kind: Any, index: Any = None) -> str:
    return f"{short(kind)}:{short(index)}"


NAMES: dict[str, Name] = {
    name.text: name
    for name in (
        *(Name(text) for text in (*STORAGES, *DTYPES, "torch.nn.parameter.Parameter")),
        Name("collections.OrderedDict", _empty_dict),
        Name("torch._utils._rebuild_tensor", _tensor),
        Name("torch._utils._rebuild_tensor_v2", _tensor_v2),
        Name("torch._utils._rebuild_tensor_v3", _tensor_v3),
        Name("torch._utils._rebuild_parameter", _parameter),
        Name("torch._utils._rebuild_parameter_with_state", _parameter),
        Name("torch.Size", _size),
        Name("torch.device", _device),
    )
}


def _state_dict(value: object) -> dict[str, TorchTensor]:
    """The dict of tensors that a file holds, at its top or under one of the usual keys."""
    if not isinstance(value, dict):
        raise BadPickleError(
            f"holds a {_kind(value)} where a dict of tensors was expected", STATE_DICT_ONLY
        )
    nested = [value[key] for key in NESTED_UNDER if _only_tensors(value.get(key))]
    found = value if _only_tensors(value) else nested[0] if len(nested) == 1 else None
    if found is None:
        kinds = {key: _kind(entry) for key, entry in value.items()}
        raise BadPickleError(
            f"holds {short(kinds, 200)} where a dict of tensors was expected, or one under "
            f"{' or '.join(NESTED_UNDER)}",
            STATE_DICT_ONLY,
        )
    return found


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TorchTensor) else type(value).__name__


def _only_tensors(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and name.isprintable() and isinstance(entry, TorchTensor)
        for name, entry in value.items()
    )
