"""The rows of WebDataset's tar shards.

    KEY.json with KEY.jpg or KEY.mp4 beside --TarRows--> a row for each KEY.json, in their order,
                                                         that names what lies beside as its image

Whatever else lies in the shards may be what a model is to read, so it is refused by its name.
"""

import posixpath
from collections.abc import Sequence
from typing import Any

from llava_mini_jax.data.media.video import PICTURE_SUFFIXES
from llava_mini_jax.data.media.video_names import SUFFIXES
from llava_mini_jax.data.sets.data_files import DataFile, parse_json
from llava_mini_jax.data.sets.tar_shards import Shards
from llava_mini_jax.errors import InputError


class TarRows:
    """A row for each .json of the shards, in their order, with the image or video beside it."""

    media_beside = False  # their names and sizes are in the digest

    def __init__(self, files: Sequence[DataFile]):
        self.files = files
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.shards = Shards(files, f"{files[0]}{more}")
        self._rows: list[int] = []  # numbers of the .json files
        media: dict[str, str] = {}  # by key
        for number, name in enumerate(self.shards.names):
            key, suffix = _key(name)
            if suffix == ".json":
                self._rows.append(number)
            elif suffix is not None:
                self._add(media, key, name, suffix)
        self._media = [media.pop(_key(self.shards.names[n])[0], None) for n in self._rows]
        if media:
            name = next(iter(media.values()))
            raise InputError(
                f"{self.shards} has {len(media)} files such as {name!r:.100} without a .json of the"
                " same name beside; add these, or give the conversations as .jsonl and the shards"
                " as the place of its images."
            )

    def _add(self, media: dict[str, str], key: str, name: str, suffix: str) -> None:
        if suffix not in (*PICTURE_SUFFIXES, *SUFFIXES):
            raise InputError(
                f"{self.shards} has {name!r:.100}, which is not read; expected a .json and an"
                " image or video of each sample. Leave other files out."
            )
        if key in media:
            raise InputError(
                f"{self.shards} has {media[key]!r:.100} and {name!r:.100}; a sample has one image"
                " or video. Leave one out."
            )
        media[key] = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        content = self.shards.read(self._rows[row])
        fields = parse_json(content, self.place(row), "a sample")
        beside = self._media[row]
        if beside is None or not isinstance(fields, dict):
            return fields
        keys = [key for key in ("image", "images", "video", "video_id") if fields.get(key)]
        for key in keys:  # LLaVA's rows name their image, by the path that it once had
            given = fields[key]
            if posixpath.basename(str(given)) != posixpath.basename(beside):
                raise InputError(
                    f'{self.place(row)}: its "{key}" is {given!r:.100}, but {beside!r:.100} is'
                    " the file of that sample; correct one of them."
                )
        own = "video" if _key(beside)[1] in SUFFIXES else "image"
        return {**{k: v for k, v in fields.items() if k not in keys}, own: beside}

    def place(self, row: int) -> str:
        number = self._rows[row]
        return f"{self.files[self.shards.locate(number)[0]]}, {self.shards.names[number]}"

    def digests(self) -> dict[str, str]:
        pairs = zip(self.files, self.shards.indices, strict=True)
        return {file.name: index.digest for file, index in pairs}


def _key(name: str) -> tuple[str, str | None]:
    """WebDataset's key of a sample, and the rest of the name; None for a hidden file."""
    folder, base = posixpath.split(name)
    if base.startswith("."):
        return name, None
    stem, dot, rest = base.partition(".")
    return posixpath.join(folder, stem), (dot + rest).lower()
