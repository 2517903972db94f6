"""Weight files, read lazily; save.py writes them.

    a model folder, first that is there             one file
      1  model.safetensors.index.json + shards        *.safetensors   *.index.json
      2  model.safetensors                            *.bin  *.pt  *.pth
      3  every other *.safetensors, together               |
      4  pytorch_model.bin.index.json + shards             |
      5  pytorch_model.bin                                 |
               '--------------------+----------------------'
                                    |        open_tensors
                          {name: LazyTensor} --read(index)--> numpy

What a file says about itself is checked before it is believed; the readers of the two formats are
`safetensors_header` and `torch_bin`. A lone `mm_projector.bin` or adapter is read only when it is
named itself, because it is part of a model and not one.
"""

import re
import warnings
from pathlib import Path

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.tensorfiles.safetensors_header import (
    MAX_HEADER_BYTES,
    read_safetensors,
    strict_json,
)
from llava_mini_jax.tensorfiles.torch_bin import read_torch

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)")
GIT_LFS_POINTER = b"version https://git-lfs"


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a model folder, or of one weight file, by name; none is read yet.

    Raises InputError for a missing or incomplete model and for files that are not what they say.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(
                f"{path} is neither a folder nor a file; expected a model folder or a weight file, "
                "so check the path, or download the model to it first."
            )
        tensors = _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read ({error.strerror}); expected a model folder "
            "or a weight file that you may read."
        ) from error
    if not tensors:
        raise InputError(f"{path} holds no tensors; give a file or folder that holds weights.")
    return tensors


def _open_folder(folder: Path) -> dict[str, LazyTensor]:
    others = sorted(folder.glob("*.safetensors"))
    if others and (torch := [f for f in (TORCH_FILE, TORCH_INDEX) if (folder / f).is_file()]):
        # Folders of the hub often hold one model in both formats; transformers reads this one too.
        warnings.warn(
            f"{folder} holds weights twice, *.safetensors and {torch[0]}: *.safetensors are read",
            stacklevel=3,
        )
    for whole, index, pattern in (
        (folder / SAFETENSORS_FILE, folder / SAFETENSORS_INDEX, "*.safetensors"),
        (folder / TORCH_FILE, folder / TORCH_INDEX, "*.bin"),
    ):
        if whole.is_file() or index.is_file():
            read = index if index.is_file() else whole
            _refuse_second_model(read, whole, sorted(folder.glob(pattern)))
            return _open_file(read)
        if others:
            _refuse_missing_shards(folder, [file.name for file in others])
            return _union(others)
    alone = sorted(file.name for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES)
    hint = f" It holds {', '.join(alone)}: name the file itself to read it." if alone else ""
    raise InputError(
        f"{folder} holds no model weights; expected {SAFETENSORS_INDEX}, *.safetensors, "
        f"{TORCH_INDEX} or {TORCH_FILE} in it, so check the path or download the model again.{hint}"
    )


def _refuse_second_model(read: Path, whole: Path, files: list[Path]) -> None:
    """What an older save left beside a newer one: nothing says which of the two is meant."""
    used = {read.name} if read == whole else set(_weight_map(read).values())
    rivals = [f for f in files if f == whole or SHARD_NAME.fullmatch(f.name)]
    if stale := [f.name for f in rivals if f.name not in used]:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise InputError(
            f"{read.parent} holds two models: the one of {read.name}, and {stale[0]}{more}, which"
            " does not belong to it; remove the files of the other one."
        )


def _open_file(path: Path) -> dict[str, LazyTensor]:
    if path.name.endswith(".index.json"):
        return _open_index(path)
    with path.open("rb") as file:
        start = file.read(len(GIT_LFS_POINTER))
    if start == GIT_LFS_POINTER:
        raise InputError(
            f"{path} is a Git LFS pointer where the weights themselves were expected; run "
            "`git lfs pull` in its folder, or download the file again."
        )
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path)
    raise InputError(
        f"{path} ends in {path.suffix!r} where a weight file ends in .safetensors, .index.json, "
        f"{', '.join(TORCH_SUFFIXES)}; rename it, or name the right file."
    )


def _open_index(path: Path) -> dict[str, LazyTensor]:
    """The tensors of all shards, each where the index says and none besides."""
    weight_map = _weight_map(path)
    files = {name: path.parent / name for name in sorted(set(weight_map.values()))}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise InputError(
            f"{path} names {len(files)} files, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in its folder; download what is missing."
        )
    shards = {name: _open_file(file) for name, file in files.items()}
    problems = [
        f"tensor {name!r} is not in {file} as the index says"
        for name, file in weight_map.items()
        if name not in shards[file]
    ] + [
        f"tensor {name!r} is in {file}, which the index does not say"
        for file, tensors in shards.items()
        for name in tensors
        if weight_map.get(name) != file
    ]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"{path} does not match its files: {'; '.join(problems[:10])}{more}; the files are of "
            "different downloads or models, so download the whole folder again."
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file; the files are in the index's own folder."""
    again = "download it again."
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES:,} bytes")
        index = strict_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a readable index ({error}); {again}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f'{path} has {short(weight_map)} as its "weight_map", where tensor names and their '
            f"files were expected; {again}"
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name and file.isprintable()
        if not plain or not file.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise InputError(
                f"{path} places tensor {short(name)} in {short(file)}, where the plain name of a "
                f"weight file in its own folder was expected; {again}"
            )
    return weight_map


def _refuse_missing_shards(folder: Path, names: list[str]) -> None:
    matches = [match for name in names if (match := SHARD_NAME.fullmatch(name))]
    for stem, total in sorted({(match["stem"], match["total"]) for match in matches}):
        wanted = [f"{stem}-{n:05d}-of-{total}.safetensors" for n in range(1, int(total) + 1)]
        if missing := [name for name in wanted if name not in names]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"{folder} has {len(wanted) - len(missing)} of the {len(wanted)} shards of {stem}; "
                f"{', '.join(missing[:5])}{more} missing, so download the rest."
            )


def _union(files: list[Path]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in _open_file(file).items():
            if name in tensors:
                raise InputError(
                    f"{tensors[name].file} and {file.name} both hold tensor {name!r}, and no index "
                    "says which one to read; name the file to read, or remove the other."
                )
            tensors[name] = tensor
    return tensors
