"""LLaVA-OneVision's YAML lists of data sets.

"datasets: [{json_path, sampling_strategy, image_folder, weight}]" --read_list--> Datasets
"""

import reprlib
from pathlib import Path
from typing import Any

from llava_mini_jax.data.sets.data_files import existing_file, is_remote
from llava_mini_jax.data.sets.sources import Dataset
from llava_mini_jax.errors import InputError

_MOST_BYTES, _MOST_VALUES = 2**23, 100_000


def read_list(path: Path | str, images: str = "") -> tuple[Dataset, ...]:
    """The data sets of a LLaVA-OneVision YAML list.

    datasets:
      - json_path: captions.json       # relative to the YAML file
        sampling_strategy: first:10%   # optional
        image_folder: coco             # optional, as `weight` is; these two keys are ours

    images: folder for the entries that name none. Raises InputError for any other shape or key.
    """
    path = Path(path)
    existing_file(path)
    try:
        content = _load_yaml(path)
    except InputError:
        raise
    except Exception as error:  # its constructors raise almost anything on damaged files
        reason = " ".join(str(error).split())
        raise InputError(
            f"Cannot read the list {path}: not valid YAML ({reason}); correct it."
        ) from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'The list {path} has no entries under "datasets"; expected "datasets:" and below it'
            ' lines such as "- json_path: captions.json".'
        )
    return tuple(_listed(entry, i + 1, path, images) for i, entry in enumerate(entries))


def _load_yaml(path: Path) -> Any:
    """Plain values. Aliases may not multiply: nine lines of them can stand for a billion values."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise InputError(f"The list {path} has {size:,} bytes; at most {_MOST_BYTES:,} are read.")
    content = path.read_bytes()
    sizes: dict[str, int] = {}  # events of what has an anchor, aliases in it included
    inside: list[list[Any]] = []  # [anchor, events so far] of what is open
    total = 0
    for event in yaml.parse(content, Loader=loader):
        anchor: Any = getattr(event, "anchor", None)
        count = sizes.get(anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append([anchor, 0])
        elif isinstance(event, yaml.CollectionEndEvent):
            name, count = inside.pop()
            if name is not None:
                sizes[name] = count
        if inside:
            inside[-1][1] += count
        total = max(total, count)
        if total > _MOST_VALUES or (inside and inside[-1][1] > _MOST_VALUES):
            raise InputError(
                f"The list {path} has aliases that stand for more than {_MOST_VALUES:,} values;"
                " write its contents out."
            )
    return yaml.load(content, Loader=loader)


def _listed(entry: Any, number: int, path: Path, images: str) -> Dataset:
    kinds: dict[str, Any] = {
        "json_path": str,
        "sampling_strategy": str,
        "image_folder": str,
        "weight": int | float,
    }
    fields = entry if isinstance(entry, dict) else {}
    wrong = [k for k, v in fields.items() if k not in kinds or not isinstance(v, kinds[k])]
    if wrong or "json_path" not in fields:
        raise InputError(
            f'{path}: entry {number} is {reprlib.repr(entry):.80}; expected "json_path" and at most'
            f" {', '.join(list(kinds)[1:])}. Correct the entry."
        )
    folder = fields.get("image_folder")
    return Dataset(
        path=_beside(path, fields["json_path"]),
        images=images if folder is None else _beside(path, folder),
        sampling=fields.get("sampling_strategy", "all"),
        weight=float(fields.get("weight", 1)),
    )


def _beside(path: Path, name: str) -> str:
    return name if is_remote(name) else str(path.parent / name)
