"""Images of a few bytes that ask for much: by size, scans, tags, profiles, comments, shape.

make(kind) --> the bytes of a file; KINDS names them all
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

KINDS: dict[str, Callable[[], bytes]] = {}


def bomb(name: str, *given) -> Callable:
    """Registers a maker under a name, with arguments."""

    def register(make: Callable) -> Callable:
        KINDS[name] = functools.partial(make, *given)
        return make

    return register


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- PNG ------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(total: int) -> bytes:
    """So many zeros, compressed."""
    packer = zlib.compressobj(1)
    block = bytes(2**22)
    whole, rest = divmod(total, len(block))
    parts = [packer.compress(block) for _ in range(whole)]
    return b"".join([*parts, packer.compress(bytes(rest)), packer.flush()])


@bomb("png: pixels beyond the limit", 30_000, 30_000, 1, 0, False)
@bomb("png: one bit, just below", 13_000, 13_000, 1, 0, False)
@bomb("png: grey", 13_000, 13_000, 8, 0, False)
@bomb("png: 16 bits of grey", 9_000, 9_000, 16, 0, False)
@bomb("png: colours", 13_000, 13_000, 8, 2, False)
@bomb("png: 16 bits of colours", 9_000, 9_000, 16, 2, False)
@bomb("png: transparent", 13_000, 13_000, 8, 6, False)
@bomb("png: interlaced", 12_000, 12_000, 8, 2, True)
@bomb("png: 178 million pixels wide", 2**31 - 1, 1, 1, 0, False)
@bomb("png: wide", 170_000_000, 1, 1, 0, False)
@bomb("png: high", 1, 60_000_000, 1, 0, False)
@bomb("png: a strip", 1_000_000, 60, 8, 2, False)
@bomb("png: a high strip", 60, 1_000_000, 8, 2, False)
def png(width: int, height: int, depth: int, colour: int, interlaced: bool, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + -(-width * samples * depth // 8)
    data = packed(row * height if row * height < 2**29 else 2**20)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def small_png(*more: bytes) -> bytes:
    return png(8, 8, 8, 2, False, *more)


@bomb("png: text that unpacks", b"zTXt", b"a\0\0")
@bomb("png: international text that unpacks", b"iTXt", b"a\0\1\0\0\0")
@bomb("png: a profile that unpacks", b"iCCP", b"a\0\0")
def png_unpacks(name: bytes, start: bytes) -> bytes:
    return small_png(chunk(name, start + packed(2**29)))


@bomb("png: many texts", b"tEXt", b"a\0b", 300_000)
@bomb("png: many packed texts", b"zTXt", b"a\0\0" + packed(900_000), 2000)
@bomb("png: many blocks of nobody", b"prIv", b"", 2_000_000)
@bomb("png: many times of change", b"tIME", bytes(7), 1_000_000)
def png_many(name: bytes, data: bytes, count: int) -> bytes:
    return small_png(chunk(name, data) * count)


@bomb("png: an animation of frames that are huge")
def animation() -> bytes:
    control = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 2, 1))
    return small_png(control, frame)


# --- Tags -----------------------------------------------------------------------------------------


def tags(entries: list[tuple[int, int, int, int]], size: int = 0, next_ifd: int = 0) -> bytes:
    """A little-endian TIFF block of (tag, type, count, value or offset), padded to `size`."""
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return (block + struct.pack("<I", next_ifd)).ljust(size, b"\0")


def same_bytes(count: int, size: int) -> bytes:
    """Tags that all are the same bytes."""
    return tags([(40_000 + i, 7, size - 100_000, 99_000) for i in range(count)], size)


def with_exif(exif: bytes) -> bytes:
    """A JPEG; blocks longer than a segment are continued in the next one."""
    parts = [exif[i : i + 60_000] for i in range(0, len(exif), 60_000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts
    )
    return b"\xff\xd8" + segments + saved(Image.new("RGB", (8, 8)), "JPEG")[2:]


KINDS |= {
    "jpeg: tags that are the same bytes": lambda: with_exif(same_bytes(5000, 2_000_000)),
    "png: tags that are the same bytes": lambda: small_png(
        chunk(b"eXIf", same_bytes(5000, 2_000_000))
    ),
    "webp: tags that are the same bytes": lambda: riff(
        b"EXIF", same_bytes(5000, 2_000_000), saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    ),
    "tiff: tags that are the same bytes": lambda: same_bytes(5000, 2_000_000),
    "tiff: a directory that is its own next": lambda: tags([(256, 3, 1, 8)] * 3, 200, 8),
    "tiff: 65,535 tags": lambda: tags([(i, 3, 1, 1) for i in range(65_535)], 2_000_000),
    "jpeg: a directory inside of itself": lambda: with_exif(tags([(0x8769, 4, 1, 8)], 200)),
    "jpeg: a damaged direction": lambda: with_exif(tags([(0x0112, 3, 2**31, 2**31)], 200)),
}


def riff(name: bytes, data: bytes, webp: bytes) -> bytes:
    """A WebP file in its extended form with one block more."""
    header = struct.pack("<4sIB3x", b"VP8X", 10, 0x08) + bytes([7, 0, 0, 7, 0, 0])
    block = struct.pack("<4sI", name, len(data)) + data + bytes(len(data) % 2)
    body = b"WEBP" + header + webp[12:] + block
    return b"RIFF" + struct.pack("<I", len(body)) + body


# --- TIFF -----------------------------------------------------------------------------------------


@bomb("tiff: a strip of everything", 13_000, 13_000, 2, 1, {})
@bomb("tiff: 16 bits", 12_000, 12_000, 0, 1, {258: (3, 1, 16)})
@bomb("tiff: packed", 13_000, 13_000, 2, 32773, {})
@bomb("tiff: deflated", 13_000, 13_000, 2, 8, {})
@bomb("tiff: by LZW", 13_000, 13_000, 2, 5, {})
@bomb("tiff: tiles larger than it", 16, 16, 2, 8, {322: (4, 1, 2**17), 323: (4, 1, 2**17)})
@bomb("tiff: samples without end", 16, 16, 2, 1, {277: (3, 1, 65_535)})
@bomb("tiff: sides of 4 billion", 2**32 - 1, 2**32 - 1, 1, 1, {})
@bomb("tiff: a table of strips without end", 16, 16, 1, 8, {273: (4, 2**30, 300)})
def tiff(width: int, height: int, photometric: int, compression: int, more: dict) -> bytes:
    entries = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, compression),
        262: (3, 1, photometric),
        273: (4, 1, 400),
        277: (3, 1, 3 if photometric == 2 else 1),
        278: (4, 1, height),
        279: (4, 1, 2**20),
    } | more
    return tags([(tag, *value) for tag, value in entries.items()], 400) + packed(2**28)


# --- GIF, BMP -------------------------------------------------------------------------------------


def gif(width: int, height: int, *before: bytes) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6)
    picture = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return screen + b"".join(before) + picture + b";"


COMMENT = b"!\xfe" + (b"\xff" + b"x" * 255) + b"\0"
KINDS |= {
    "gif: huge": lambda: gif(13_000, 13_000),
    "gif: larger than the limit": lambda: gif(65_535, 65_535),
    "gif: a small frame on a huge screen": lambda: gif(13_000, 13_000)[:23]
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00;",
    "gif: comments that are joined": lambda: gif(8, 8, COMMENT * 100_000),
    "gif: one comment of many blocks": lambda: gif(8, 8, b"!\xfe" + (b"\x01x") * 2_000_000 + b"\0"),
    "gif: extensions of nobody": lambda: gif(8, 8, b"!\x99\x01x\0" * 1_000_000),
    "bmp: huge": lambda: bmp(13_000, 13_000, 24, 0),
    "bmp: runs": lambda: bmp(13_000, 13_000, 8, 1),
    "bmp: sides of 2 billion": lambda: bmp(2**31 - 1, 2**31 - 1, 8, 1),
    "bmp: upside down": lambda: bmp(13_000, -13_000, 32, 0),
}  # fmt: skip


def bmp(width: int, height: int, bits: int, compression: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 1, 1, 256, 0)
    body = info + bytes(1024) + b"\xff\0" * 100_000 + b"\0\1"
    return b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + 40 + 1024) + body


# --- JPEG -----------------------------------------------------------------------------------------


def resized_jpeg(width: int, height: int, **options) -> bytes:
    """A JPEG that says it is larger than its data."""
    content = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG", **options))
    frame = next(
        content.index(b"\xff" + bytes([m])) for m in (0xC2, 0xC0) if bytes([255, m]) in content
    )
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose first scan comes again and again."""
    content = resized_jpeg(side, side, progressive=True)
    start = content.index(b"\xff\xda")
    second = content.index(b"\xff\xda", start + 2)
    return content[:start] + content[start:second] * count + content[second:]


KINDS |= {
    "jpeg: huge": lambda: resized_jpeg(13_000, 13_000),
    "jpeg: huge and progressive": lambda: resized_jpeg(13_000, 13_000, progressive=True),
    "jpeg: larger than the limit": lambda: resized_jpeg(65_500, 65_500),
    "jpeg: thousands of scans": lambda: scans(5000, 8000),
    "jpeg: scans over many pixels": lambda: scans(90, 10_000),
    "jpeg: many comments": lambda: jpeg_segments(b"\xff\xfe\0\x03x", 500_000),
    "jpeg: comments of megabytes": lambda: jpeg_segments(b"\xff\xfe\xff\xff" + bytes(65_533), 2000),
    "jpeg: many tables": lambda: jpeg_segments(b"\xff\xdb\0\x43\0" + bytes([1] * 64), 500_000),
    "jpeg: parts of profiles": lambda: jpeg_segments(
        b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\xff" + bytes(65_519), 2000
    ),
    "jpeg: camera's resources": lambda: jpeg_segments(
        b"\xff\xed\xff\xff" + b"Photoshop 3.0\0" + b"8BIM\x04\x04" * 10_919 + bytes(5), 500
    ),
}  # fmt: skip


def jpeg_segments(segment: bytes, count: int) -> bytes:
    return b"\xff\xd8" + segment * count + saved(Image.new("RGB", (8, 8)), "JPEG")[2:]


# --- WebP -----------------------------------------------------------------------------------------


@bomb("webp: canvas of the largest sides, animated", 16_384)
@bomb("webp: canvas just below the limit", 13_000)
def webp_canvas(side: int) -> bytes:
    frames = [Image.new("RGB", (8, 8), (i * 9, 0, 0)) for i in range(3)]
    content = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = 2 * (side - 1).to_bytes(3, "little")
    return bytes(content)


@bomb("webp: lossless and flat")
def webp_flat() -> bytes:
    return saved(
        Image.fromarray(np.zeros((6000, 8000), np.uint8)).convert("RGB"),
        "WEBP",
        lossless=True,
        method=0,
    )
