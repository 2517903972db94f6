"""Tensors written as Hugging Face's safetensors, in shards: all of a model or nothing.

any (name, array)s, one after another
    --save_tensors--> model.safetensors, or model-00001-of-0000N.safetensors ... + index
"""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.tensorfiles.files import SAFETENSORS_FILE, SAFETENSORS_INDEX
from llava_mini_jax.tensorfiles.safetensors_header import DTYPES


def save_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int = 5_000_000_000
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
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
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
