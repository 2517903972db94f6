"""Weight files, read lazily and written in shards.

    a model folder, first that is there             one file
      1  model.safetensors.index.json + shards        *.safetensors   *.index.json
      2  model.safetensors                            *.bin  *.pt  *.pth
      3  every other *.safetensors, together               |
      4  pytorch_model.bin.index.json + shards             |
      5  pytorch_model.bin                                 |
               '--------------------+----------------------'
                                    |        open_tensors
                          {name: LazyTensor} --read(index)--> numpy
                                    |
                   any (name, array)s, one after another
                                    |        save_tensors
          model.safetensors, or model-00001-of-0000N.safetensors ... + index

What a file says about itself is checked before it is believed; the readers of the two formats are
`safetensors_header` and `torch_bin`. A lone `mm_projector.bin` or adapter is read only when it is
named itself, because it is part of a model and not one.
"""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.tensorfiles.safetensors_header import (
    DTYPES,
    MAX_HEADER_BYTES,
    read_safetensors,
    strict_json,
)
from llava_mini_jax.tensorfiles.torch_bin import read_torch

__all__ = ["LazyTensor", "open_tensors", "save_tensors"]

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


def save_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write `tensors` as Hugging Face's safetensors and return the files, the index last.

    Takes `tensors` one by one and holds about one shard at a time. The files get their names when
    all are complete; whatever interrupts it before then, the folder is left as it was.

    Raises InputError for a folder that holds a model already, and for tensors that cannot be saved.
    """
    folder = Path(folder)
    _refuse_existing(folder)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    final: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            complete = _write_shards(Path(staging), tensors, max_shard_bytes)
            final = [folder / file.name for file in complete]
            for file, name in zip(complete, final, strict=True):
                file.rename(name)
    except BaseException:  # also KeyboardInterrupt: half a model must never look like one
        for file in final:
            file.unlink(missing_ok=True)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    return final


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
            " does not belong to it; remove the files of the one that is not meant."
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
            f"{path} does not fit its files: {'; '.join(problems[:10])}{more}; the files are of "
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
                    "says which is meant; name the file to read, or remove the other."
                )
            tensors[name] = tensor
    return tensors


def _refuse_existing(folder: Path) -> None:
    """An older model beside a new one would be half replaced, or read in its place."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file where a folder for the weights was expected.")
    if existing := sorted(folder.glob("model*.safetensors*")):
        raise InputError(
            f"{folder} already holds {existing[0].name}; give a new folder, or remove the "
            f"{len(existing)} older model*.safetensors* files in it."
        )


def _write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> list[Path]:
    """The files of a whole model, under their own names in `folder`, the index last."""
    numbers: dict[str, int] = {}  # tensor name -> number of its shard
    files, total_bytes = [], 0
    for shard in _shards(tensors, max_shard_bytes):
        files.append(folder / f"{len(files)}")
        files[-1].touch()
        mode = files[-1].stat().st_mode
        save_file(shard, files[-1], metadata={"format": "pt"})  # transformers asks for it
        files[-1].chmod(mode)  # the library makes a file that only its owner may read
        numbers |= dict.fromkeys(shard, len(files) - 1)
        total_bytes += sum(array.nbytes for array in shard.values())
        del shard  # or it would stay in memory while the next one fills
    if not files:
        raise InputError("No tensors were given to save; give at least one.")
    if len(files) == 1:
        return [files[0].rename(folder / SAFETENSORS_FILE)]
    names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    weight_map = {tensor: names[number] for tensor, number in numbers.items()}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    index_file = folder / SAFETENSORS_INDEX
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shards = [file.rename(folder / name) for file, name in zip(files, names, strict=True)]
    return [*shards, index_file]


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterable[dict[str, np.ndarray]]:
    """Tensors in groups of at most `max_bytes`, as huggingface_hub groups them: one after another,
    and a larger one by itself without ending the group that is being filled.
    """
    shard: dict[str, np.ndarray] = {}
    shard_bytes = 0
    seen: set[str] = set()
    savable = set(DTYPES.values())
    for name, array in tensors:
        if name in seen or name == "__metadata__":
            raise InputError(f"tensor {name!r} cannot be saved: its name is taken; rename it.")
        if array.dtype.newbyteorder("=") not in savable:
            raise InputError(
                f"tensor {name!r} is of dtype {array.dtype}, which safetensors cannot hold; "
                f"convert it to one of {', '.join(sorted(dtype.name for dtype in savable))}."
            )
        seen.add(name)
        array = np.asarray(array, order="C")
        if array.nbytes > max_bytes:
            yield {name: array}
            continue
        if shard_bytes + array.nbytes > max_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard_bytes += array.nbytes
        shard[name] = array
    if shard:
        yield shard
