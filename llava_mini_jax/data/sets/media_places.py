"""Where the images and videos of a data set lie, found by the names that its rows have.

    Dataset.images  "coco"            --open_place--> Folder   a path
                    "gs://bucket/coco"                Bucket   bytes, read when the sample is
                    "coco-{000..099}.tar"             Shards   the same (tar_shards.py)

A name that is not there is the sample's fault (InputError); a bucket that does not answer is not
(LostError).
"""

import os
from pathlib import Path
from typing import Protocol

from llava_mini_jax.data.media.video_names import SUFFIXES, find_video
from llava_mini_jax.data.sets.arrayrecord import PackedVideo
from llava_mini_jax.data.sets.data_files import Remote, cannot_read, is_remote, one_line, remote
from llava_mini_jax.data.sets.tar_shards import is_tar, open_shards
from llava_mini_jax.errors import InputError, LostError

_ENDS = ("", *SUFFIXES)  # Video-ChatGPT's ids have no suffix, so then whichever the file has


class Place(Protocol):
    """`place` in its functions is the row's, for errors."""

    def picture(self, name: str, place: str) -> str | bytes:
        """A path, or the bytes of the file."""
        ...

    def video(self, name: str, place: str) -> str | PackedVideo: ...

    def measured(self, name: str, is_video: bool) -> tuple[str, int] | None:
        """(what it is called, bytes); -1 for what is no file, None for a video that is not there.

        Nothing of its content is read.
        """
        ...


def open_place(images: str, of: str) -> Place:
    """What `images` of the data set `of` stands for. InputError where there is nothing."""
    if is_tar(images):
        return open_shards(images)
    if is_remote(images):
        return Bucket(remote(images.rstrip("/")))
    if not os.path.isdir(images):
        raise InputError(
            f"{of}: its folder of images {images} does not exist or is not a folder; give the"
            " folder that the paths in the data file are relative to."
        )
    return Folder(Path(images))


class Folder:
    """On a disk. Nothing is opened here: decoders read paths themselves."""

    def __init__(self, path: Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def picture(self, name: str, place: str) -> str:
        return str(self._path / name)

    def video(self, name: str, place: str) -> str:
        path = str(find_video([self._path], [name], _ENDS))
        if os.path.exists(path):
            return path
        raise no_video(path, place)

    def measured(self, name: str, is_video: bool) -> tuple[str, int] | None:
        path = str(find_video([self._path], [name], _ENDS) if is_video else self._path / name)
        if is_video and not os.path.exists(path):
            return None
        size = os.stat(path).st_size if os.path.isfile(path) else -1
        return os.path.relpath(path, self._path), size


class Bucket:
    """A folder in a bucket. Rows may name what is in it by whole URLs too."""

    def __init__(self, root: Remote):
        self._root = root
        try:
            exists = root.fs.exists(root.path)
        except Exception as error:  # what buckets' packages raise has no common base
            raise cannot_read(str(root), error) from error
        if not exists:
            raise InputError(f"There is nothing at {root}; check the URL and your access to it.")

    def __str__(self) -> str:
        return str(self._root)

    def picture(self, name: str, place: str) -> bytes:
        content = self._read(self._path(name, place))
        if content is None:
            raise InputError(
                f"{place}: there is no image {name!r:.200} in {self}; copy it there or remove the"
                " sample."
            )
        return content

    def video(self, name: str, place: str) -> PackedVideo:
        path = self._path(name, place)
        for end in _ENDS:
            content = self._read(path + end)
            if content is not None:
                return PackedVideo((os.path.basename(path + end),), (content,), False)
        raise no_video(f"{self}/{name}", place)

    def measured(self, name: str, is_video: bool) -> tuple[str, int] | None:
        for end in _ENDS if is_video else ("",):
            try:
                size = self._root.fs.size(self._path(name, "") + end)
                return name + end, -1 if size is None else int(size)
            except (FileNotFoundError, InputError):
                continue
            except Exception as error:  # as above
                raise self._lost(name, error) from error
        return None if is_video else (name, -1)

    def _path(self, name: str, place: str) -> str:
        inside = name.removeprefix(f"{self}/")
        if is_remote(inside):  # whatever a row names would be fetched, by whoever trains on it
            raise InputError(
                f"{place}: {name!r:.200} is not in {self}, which was given as the place of its"
                " images; give one that holds all."
            )
        return f"{self._root.path}/{inside}"

    def _read(self, path: str) -> bytes | None:
        """None where there is no such file."""
        try:
            return self._root.fs.cat_file(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except Exception as error:  # as above
            raise self._lost(path, error) from error

    def _lost(self, name: str, error: Exception) -> LostError:
        return LostError(
            f"Cannot read {name} in {self} ({one_line(error)}); check the network and your access,"
            " and start the same command again."
        )


def no_video(path: str, place: str) -> InputError:
    return InputError(
        f"{place}: there is no video {path!r}, with or without one of {', '.join(SUFFIXES)};"
        " copy it there or remove the sample."
    )
