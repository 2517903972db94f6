"""Samples with their images and videos in ArrayRecord shards: a TensorFlow Datasets folder.

    Packed samples --write_folder--> DIR/dataset_info.json, features.json        (tfds' own)
                                     DIR/NAME-train.array_record-00000, -00001 ...
                                     DIR/groups.npy    modality and words of each sample, last
    DIR --BuiltRows--> rows[i], read when it is asked for, as of any other data file

A record is tfds' Example of two features: `row`, the sample without its media as JSON, and `media`,
the bytes of its files. Both are Text features, because tfds writes and reads those without
TensorFlow, bytes unchanged (its Image and Video features are encoded by TensorFlow).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_mini_jax.errors import InputError

INFO, GROUPS = "dataset_info.json", "groups.npy"
SPLIT = "train"
_FLUSH_BYTES, _FLUSH_SAMPLES = 2**26, 256  # what is held until it is written
_END_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class PackedVideo:
    """The bytes of a video's file, or of the images of a video that is a folder."""

    names: tuple[str, ...]
    contents: tuple[bytes, ...] = dataclasses.field(repr=False)
    is_folder: bool

    @contextlib.contextmanager
    def unpacked(self, place: str) -> Iterator[str]:
        """The path of a copy on disk, since FFmpeg reads files; errors name `place` instead."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in zip(self.names, self.contents, strict=True):
                (Path(folder) / name).write_bytes(content)
            try:
                yield folder if self.is_folder else str(Path(folder) / self.names[0])
            except InputError as error:
                raise InputError(str(error).replace(folder, place)) from error


class Packed(NamedTuple):
    """What is stored of a sample."""

    id: str | int
    conversations: Any
    media: bytes | PackedVideo | None  # of an image, of a video, of text
    group: tuple[int, int]  # modality, words (order.py)


# --- Writing --------------------------------------------------------------------------------------


def write_folder(folder: Path, name: str, samples: Iterable[Packed], samples_a_shard: int) -> int:
    """Writes all samples into an empty folder, in their order; returns how many they were.

    Raises OSError where the disk is full. A folder without groups.npy is not whole.
    """
    groups: list[tuple[int, int]] = []
    waiting: list[dict[str, Any]] = []
    held, digest = 0, hashlib.sha256()
    try:
        writer = _writer(folder, name, samples_a_shard)
        for sample in samples:
            groups.append(sample.group)
            waiting.append(_record(sample))
            held += sum(map(len, waiting[-1]["media"]))
            for content in (waiting[-1]["row"].encode(), *waiting[-1]["media"]):
                digest.update(len(content).to_bytes(8, "little") + content)
            if held > _FLUSH_BYTES or len(waiting) >= _FLUSH_SAMPLES:
                writer.add_examples({SPLIT: waiting})
                waiting, held = [], 0
        writer.add_examples({SPLIT: waiting})
        writer.close_all()
    except RuntimeError as error:  # array_record's, for everything that goes wrong with a file
        raise OSError(f"{folder}: {error}") from error
    about = json.loads((folder / INFO).read_text())
    about["description"] += f" SHA-256 of all: {digest.hexdigest()}"
    (folder / INFO).write_text(json.dumps(about, indent=2, sort_keys=True))
    np.save(folder / GROUPS, np.array(groups, np.int32).reshape(-1, 2))
    return len(groups)


def _writer(folder: Path, name: str, samples_a_shard: int) -> Any:
    from tensorflow_datasets.core import dataset_info, sequential_writer
    from tensorflow_datasets.core.utils import version

    identity = dataset_info.DatasetIdentity(
        name=re.sub(r"\W", "_", f"_{name}" if name[:1].isdigit() else name, flags=re.ASCII),
        version=version.Version("1.0.0"),
        data_dir=str(folder),
        module_name="llava_mini_jax",
    )
    info = dataset_info.DatasetInfo(
        builder=identity, description="Samples in LLaVA's form.", features=_features()
    )
    writer = sequential_writer.SequentialWriter(
        ds_info=info, max_examples_per_shard=samples_a_shard, file_format="array_record"
    )
    writer._serializer = _serializer(info.features)
    writer.initialize_splits([SPLIT])
    return writer


def _features() -> Any:
    from tensorflow_datasets.core import features

    return features.FeaturesDict(
        {"row": features.Text(), "media": features.Sequence(features.Text())}
    )


def _serializer(features: Any) -> Any:
    """tfds' own, with the features of an Example in one order: protobuf has another one in every
    process, and two builds of the same data would be different bytes."""
    from tensorflow_datasets.core import example_serializer

    class InOrder(example_serializer.ExampleSerializer):
        def serialize_example(self, example: Any) -> bytes:
            return self.get_tf_example(example).SerializeToString(deterministic=True)

    return InOrder(features.get_serialized_info())


def _record(sample: Packed) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id, "conversations": sample.conversations}
    media: Sequence[bytes] = ()
    if isinstance(sample.media, PackedVideo):
        row["video"] = list(sample.media.names)
        row["is_folder"] = sample.media.is_folder
        media = sample.media.contents
    elif sample.media is not None:
        row["image"] = True
        media = (sample.media,)
    return {"row": json.dumps(row), "media": list(media)}


# --- Reading --------------------------------------------------------------------------------------


class BuiltRows:
    """The rows of a built folder. Opening reads the table of shards; records are read one by one.

    Raises InputError for a folder that is not whole, or that something else wrote.
    """

    media_beside = False

    def __init__(self, folder: Path):
        from tensorflow_datasets.core import read_only_builder

        self.folder = folder
        self.files: Sequence[Path] = sorted(folder.glob("*.array_record-*"))
        try:
            groups = np.load(folder / GROUPS, allow_pickle=False)
            builder: Any = read_only_builder.builder_from_directory(str(folder))
            features = builder.info.features
            if features is None or features.to_json() != _features().to_json():
                raise ValueError(f"its features are {features!r:.60}")
            self._source: Any = builder.as_data_source(split=SPLIT)
            shards = builder.info.splits[SPLIT].num_shards
        except Exception as error:  # tfds has no common base for what damaged files raise
            raise InputError(
                f"The folder {folder} is not a complete data set of `llava-mini data build`"
                f" ({_one_line(error)}); build or copy it again."
            ) from error
        if (len(self._source), shards) != (len(groups), len(self.files)):
            raise InputError(
                f"The folder {folder} has {len(self.files)} shards, {len(self._source)} samples and"
                f" groups of {len(groups)}, but {INFO} names {shards} shards: it is incomplete;"
                " build or copy it again."
            )
        self.groups: np.ndarray = groups  # int32 [n, 2]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Any:
        try:
            record = self._source[row]
            fields = json.loads(record["row"])
            media = tuple(bytes(content) for content in record["media"])
            if fields.pop("image", False):
                (fields["image"],) = media
            elif names := fields.pop("video", ()):
                if len(names) != len(media) or any(Path(n).name != n or not n for n in names):
                    raise ValueError(f"its files are {names!r:.60}")
                fields["video"] = PackedVideo(tuple(names), media, fields.pop("is_folder"))
            return fields
        except Exception as error:  # as above; array_record checks a hash of every record
            raise InputError(
                f"{self.place(row)}: {_one_line(error)}; the shard is damaged, build or copy the"
                " data set again."
            ) from error

    def place(self, row: int) -> str:
        return f"{self.folder}, sample {row + 1}"

    def digests(self) -> dict[str, str]:
        """Of shards, of their ends and of what the build says of all samples in `INFO`."""
        built = (self.folder / INFO).read_bytes()
        return {file.name: _digest(file, built) for file in self.files}


def _digest(file: Path, built: bytes) -> str:
    ends = hashlib.sha256(built)
    with file.open("rb") as content:
        ends.update(content.read(_END_BYTES))
        content.seek(max(0, file.stat().st_size - _END_BYTES))
        ends.update(content.read())
    return ends.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
