"""What an image may cost: bytes of every step, blocks of its file, and processor time.

    file --check_file--> blocks before the image, tags, tiles, scans: counted, nothing is decoded
    size, mode --check_bytes--> what decoding, converting and turning take
    decoder --within_time--> its thread's seconds

An image of a few hundred bytes can ask for gigabytes or minutes: by its size, by a colour
profile, by thousands of tags that are the same megabyte, by scans of a progressive JPEG, by tiles
larger than itself. Pillow limits the number of pixels alone.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llava_mini_jax.errors import InputError

MAX_BYTES = 2**29  # of all steps of one image together, and of its file
SECONDS = 4.0  # of processor time; a hundred megapixels take about two
MAX_BLOCKS = 20_000  # of a file before its image: of GIF, JPEG and PNG
MAX_METADATA = 2**25  # bytes of those
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
SCANNED = 2**31  # pixels in all scans of one together
_QUICK_BYTES, _QUICK_PIXELS = 2**20, 2**23  # what a thread is not worth
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip
_TILE = (322, 323)
T = TypeVar("T")


class TooMuchError(InputError):
    """An image that costs more than images do; the reason is a clause."""


# --- Files ----------------------------------------------------------------------------------------


def check_file(content: bytes) -> None:
    """Raises TooMuchError for a file whose blocks and tags ask for more than any image needs."""
    if len(content) > MAX_BYTES:
        raise TooMuchError(f"its file has {len(content):,} bytes, the limit is {MAX_BYTES:,}")
    if content[:3] == b"\xff\xd8\xff":
        _check_jpeg(content)
    elif content[:8] == b"\x89PNG\r\n\x1a\n":
        _check_blocks(_png_blocks(content), (b"eXIf", 0), "blocks")
    elif content[:4] == b"RIFF":
        _check_blocks(_riff_blocks(content), (b"EXIF", 0), "blocks")
    elif content[:3] == b"GIF":
        _check_blocks(_gif_blocks(content), (b"", 0), "extension blocks")
    elif content[:2] in (b"II", b"MM"):
        check_tags(content)


def _check_blocks(
    blocks: Iterator[tuple[bytes, bytes | memoryview]], exif: tuple[bytes, int], what: str
) -> None:
    count = total = 0
    for name, block in blocks:
        count, total = count + 1, total + len(block)
        if count > MAX_BLOCKS:
            raise TooMuchError(f"its file has more than {MAX_BLOCKS:,} {what} beside the image")
        if total > MAX_METADATA:
            raise TooMuchError(f"its file has more than {MAX_METADATA:,} bytes beside the image")
        if name == exif[0] and name:
            check_tags(bytes(block[exif[1] :]))


def _png_blocks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 8 <= len(content):
        size, name = struct.unpack(">I4s", content[at : at + 8])
        if name != b"IDAT":
            yield name, content[at + 8 : at + 8 + size]
        at += 12 + size


def _riff_blocks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(content):
        name, size = struct.unpack("<4sI", content[at : at + 8])
        if name in (b"ICCP", b"EXIF", b"XMP "):
            body = content[at + 8 : at + 8 + size]
            yield name, body.removeprefix(b"Exif\0\0")
        elif name not in (b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            yield name, b""
        at += 8 + size + size % 2


def _gif_blocks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Extension blocks in front of the first image; Pillow joins comments one by one."""
    at = 13 + (3 << (content[10] & 7) + 1 if len(content) > 10 and content[10] & 0x80 else 0)
    while content[at : at + 1] == b"!":
        at += 2
        while at < len(content) and (size := content[at]):
            yield b"", content[at + 1 : at + 1 + size]
            at += 1 + size
        at += 1


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body) up to the first scan."""
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            at += 1
            continue
        marker = content[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        yield marker, content[at + 4 : at + 2 + size]
        if marker in (0xDA, 0xD9):
            return
        at += 2 + size


def _check_jpeg(content: bytes) -> None:
    exif = b""
    pixels = progressive = 0

    def blocks() -> Iterator[tuple[bytes, bytes]]:
        nonlocal exif, pixels, progressive
        for marker, body in _jpeg_segments(content):
            if marker == 0xE1 and body[:6] == b"Exif\0\0":
                exif += body[6:]
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 5:
                height, width = struct.unpack(">HH", body[1:5])
                pixels, progressive = width * height, marker in (0xC2, 0xC6, 0xCA, 0xCE)
            yield b"", body

    _check_blocks(blocks(), (b"", 0), "segments")
    if exif:
        check_tags(exif)
    scans = content.count(b"\xff\xda")
    if progressive and (scans > MAX_SCANS or scans * pixels > SCANNED):
        raise TooMuchError(f"it is drawn in {scans:,} scans over {pixels:,} pixels each")


def check_tags(content: bytes) -> None:
    """Raises TooMuchError for tags of a TIFF file or EXIF block that are larger than they can be.

    Several tags may say that they are the same bytes; Pillow has a copy for each.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or len(content) < 8:
        return
    big = content[2:4] in (b"+\0", b"\0+")
    count, entry, width = ("Q", "HHQQ", 20) if big else ("H", "HHII", 12)
    at = struct.unpack_from(f"{order}{'Q' if big else 'I'}", content, 8 if big else 4)[0] if (
        len(content) >= 16
    ) else 0  # fmt: skip
    size = struct.calcsize(f"{order}{count}")
    if not 0 < at <= len(content) - size:
        return
    number = min(struct.unpack_from(f"{order}{count}", content, at)[0], len(content) // width)
    total, tile = 0, [0, 0]
    for start in range(at + size, min(at + size + number * width, len(content) - width + 1), width):
        tag, kind, items, _ = struct.unpack_from(f"{order}{entry}", content, start)
        total += items * _TYPE_BYTES.get(kind, 1)
        if tag in _TILE:
            short = f"{order}H" if kind == 3 else f"{order}I"
            tile[tag - _TILE[0]] = struct.unpack_from(
                short, content, start + width - (8 if big else 4)
            )[0]
    if total > 2 * len(content) + 2**16:
        raise TooMuchError(f"its {number:,} tags have {total:,} bytes, more than its file")
    if 4 * tile[0] * tile[1] > MAX_BYTES // 2:
        raise TooMuchError(f"its tiles are {tile[0]:,} x {tile[1]:,} pixels")


# --- Bytes ----------------------------------------------------------------------------------------


def check_bytes(image: Any, turned: bool) -> None:
    """Raises TooMuchError where decoding, converting and turning would take over MAX_BYTES."""
    mode = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    each = mode + 4 * (image.mode != "RGB") + 4 * turned
    if image.format == "WEBP":  # the canvas, the frame before it, and a copy
        each += 12
    elif image.format == "TIFF":  # a strip may be all of it
        each += mode
    elif image.info.get("progressive") or image.info.get("progression"):
        each += 6  # coefficients of all three colours
    rows = 16 * (1 + (image.mode != "RGB") + turned)  # Pillow's pointers to them
    needed = (image.width * each + rows) * image.height
    if needed > MAX_BYTES:
        raise TooMuchError(
            f"{image.width} x {image.height} pixels ({image.mode}) take {needed / 2**20:,.0f} MiB"
            f" to read; the limit is {MAX_BYTES / 2**20:,.0f} MiB"
        )


# --- Time -----------------------------------------------------------------------------------------


def within_time(work: Callable[[], T], size: int, pixels: int) -> T:
    """What `work` returns; TooMuchError once its thread has computed for SECONDS.

    `size` and `pixels` of the file tell what is done at once. Processor time, so that a busy
    machine refuses no other images than an idle one. What is given up ends by itself later.
    """
    clock = getattr(time, "pthread_getcpuclockid", None)
    if (size <= _QUICK_BYTES and pixels <= _QUICK_PIXELS) or clock is None:
        return work()
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # is raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=run, name="image", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if thread.is_alive() and thread.ident is not None:
            try:
                used = time.clock_gettime(clock(thread.ident))
            except (OSError, ProcessLookupError):  # it has just ended
                continue
            if used > SECONDS:
                raise TooMuchError(f"it takes more than {SECONDS:.0f} seconds to read")
    if failed:
        raise failed[0]
    return found[0]
