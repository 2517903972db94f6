"""torch's own weight files (`pytorch_model.bin`, `mm_projector.bin`), without torch or pickle.

    zip archive (torch >= 1.6)            one stream (before 1.6, or on request)
      TOP/data.pkl    the pickle            magic, version, machine    three small pickles
      TOP/data/KEY    storage bytes         the pickle
      TOP/byteorder                         keys of the storages       a pickle
             |                              count, bytes, count, bytes, ...
             |                                       |
             '------ torch_pickle: {name: tensor} ---'
                              |
                every storage inside the file?
                              |
                     {name: LazyTensor}   or one sentence that says what is wrong

The archive is never unpacked: torch stores its records uncompressed, so each tensor has a place in
the file, and a name inside it is only a key.
"""

import io
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import BinaryIO

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.tensorfiles.inert_pickle import MAX_PICKLE_BYTES, BadPickleError
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.tensorfiles.torch_pickle import (
    STATE_DICT_ONLY,
    TorchTensor,
    read_plain,
    read_state_dict,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
ZIP_ENCRYPTED = 0x1
ZIP_UTF8 = 0x800  # the flag of records with names in UTF-8


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of one file that torch.save wrote: a dict of tensors, or one under
    "state_dict" or "model".

    Raises InputError, in one sentence, for a file that is damaged, holds something other than
    tensors, or asks for anything to be run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start == b"PK\x03\x04":
                return _read_zip(path, file)
            if start[:1] == b"\x80":
                return _read_legacy(path, file)
            raise BadPickleError(f"starts with {start!r}, unlike any file that torch.save writes")
    except BadPickleError as problem:
        raise InputError(f"{path} {problem}; {problem.remedy}") from problem


def _read_zip(path: Path, file: BinaryIO) -> dict[str, LazyTensor]:
    records = _zip_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadPickleError(f"has {len(pickles)} records TOP/data.pkl where torch.save writes one")
    top = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{top}byteorder")  # older versions write none and mean the machine's own
    if order and (stated := _record_bytes(file, order, 16)) != b"little":
        raise BadPickleError(f"states the byte order {stated!r} where b'little' was expected")
    data = _record_bytes(file, records[pickles[0]], MAX_PICKLE_BYTES)
    tensors, _ = read_state_dict(io.BytesIO(data))
    places: dict[str, tuple[int, int]] = {}
    for tensor in tensors.values():
        key = tensor.storage.key
        if key not in places:
            record = records.get(f"{top}data/{key}")
            if record is None:
                raise BadPickleError(f"has no record {short(f'{top}data/{key}')} for a tensor")
            places[key] = _record_place(file, record)
    return _placed(path, tensors, places)


def _read_legacy(path: Path, file: BinaryIO) -> dict[str, LazyTensor]:
    """The stream that torch wrote before 1.6, and writes still when asked to."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic = read_plain(head)
    version = read_plain(head) if magic == LEGACY_MAGIC else None
    if version != LEGACY_VERSION:
        raise BadPickleError("holds a pickle, but not one that torch.save wrote", STATE_DICT_ONLY)
    machine = read_plain(head)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise BadPickleError(f"states the machine {short(machine)}, not a little-endian one")
    tensors, storages = read_state_dict(head)
    keys = read_plain(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadPickleError(f"lists its storages as {short(keys)} where text keys were expected")
    places, position = {}, head.tell()
    for key in keys:  # sizes are stated in elements: the pickle tells how long one is
        if key not in storages:
            raise BadPickleError(f"holds storage {short(key)}, which nothing mentions")
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        dtype = storages[key].dtype
        itemsize = 1 if dtype is None else dtype.itemsize
        places[key] = (position + 8, count * itemsize)
        position += 8 + count * itemsize
        if position > path.stat().st_size:
            raise BadPickleError(f"ends inside storage {short(key)} of {count:,} elements")
    if missing := storages.keys() - places.keys():
        raise BadPickleError(f"has no storage {short(sorted(missing))}, which a tensor needs")
    return _placed(path, tensors, places)


def _zip_records(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise BadPickleError(f"is a zip archive that is cut short or damaged ({error})") from error
    records = {info.filename: info for info in infos}
    if len(records) < len(infos):
        raise BadPickleError("is a zip archive with two records of one name")
    return records


def _record_place(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(offset in the file, bytes) of a record, which must lie there as it is."""
    name = short(info.filename)
    as_it_is = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if not as_it_is or info.flag_bits & ZIP_ENCRYPTED:
        raise BadPickleError(
            f"holds the record {name} compressed or encrypted ({info.compress_size:,} bytes for "
            f"{info.file_size:,}), which torch.save never does"
        )
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(min(max(info.header_offset, 0), file_bytes))
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise BadPickleError(f"lists a record {name} at byte {info.header_offset:,}, where none is")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    stated_name, extra = file.read(name_bytes), file.read(extra_bytes)
    # Both say where the data begin: a wrong bit in them would shift every number.
    listed_name = info.orig_filename.encode("utf-8" if info.flag_bits & ZIP_UTF8 else "cp437")
    if stated_name != listed_name or not _whole_fields(extra):
        raise BadPickleError(f"has a damaged record {name} (it is called {short(stated_name)})")
    if file.tell() + info.file_size > file_bytes:
        raise BadPickleError(f"ends inside the record {name} of {info.file_size:,} bytes")
    return file.tell(), info.file_size


def _whole_fields(extra: bytes) -> bool:
    """Is `extra` made of whole fields, each an id and a length (two bytes each) and its bytes?"""
    position = 0
    while position + 4 <= len(extra):
        position += 4 + int.from_bytes(extra[position + 2 : position + 4], "little")
    return position == len(extra)


def _record_bytes(file: BinaryIO, info: zipfile.ZipInfo, limit: int) -> bytes:
    offset, nbytes = _record_place(file, info)
    if nbytes > limit:
        raise BadPickleError(f"has a record {info.filename} of {nbytes:,} bytes, {limit:,} at most")
    file.seek(offset)
    data = file.read(nbytes)
    if info.CRC and zlib.crc32(data) != info.CRC:  # 0: torch was told to leave it out
        raise BadPickleError(f"has a damaged record {info.filename} (its checksum is wrong)")
    return data


def _placed(
    path: Path, tensors: dict[str, TorchTensor], places: dict[str, tuple[int, int]]
) -> dict[str, LazyTensor]:
    """The tensors with their places in the file; `places` gives (offset, bytes) of each storage."""
    file_bytes = path.stat().st_size
    result = {}
    for name, tensor in tensors.items():
        itemsize = tensor.dtype.itemsize
        start, available = places[tensor.storage.key]
        if tensor.storage.nbytes > available:
            raise BadPickleError(
                f"states {tensor.storage.nbytes:,} bytes for the storage of tensor {short(name)} "
                f"and holds {available:,}"
            )
        if 0 not in tensor.shape and prod(tensor.shape) * itemsize > file_bytes:
            raise BadPickleError(  # a few bytes that strides of 0 repeat until the memory is full
                f"holds tensor {short(name)} of shape {tensor.shape}, larger than the whole file"
            )
        result[name] = LazyTensor(
            name,
            tensor.shape,
            tensor.dtype,
            file=path,
            offset=start + tensor.offset * itemsize,
            strides=tuple(stride * itemsize for stride in tensor.strides),
        )
    return result
