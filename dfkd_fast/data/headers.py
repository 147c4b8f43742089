"""Detects image files that all decoders decode to the same pixels: complete 8-bit grayscale or RGB JPEG and PNG files."""

from pathlib import Path
from typing import BinaryIO

__all__ = ["decodes_identically"]

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 89_478_485
"""PIL warns of decompression bombs above this number of pixels and refuses images of twice as many."""
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
START_OF_SCAN, ADOBE, END_OF_IMAGE = 0xDA, 0xEE, b"\xff\xd9"
WITHOUT_SEGMENT = {0x01, *range(0xD0, 0xD8)}
"""JPEG markers that are not followed by a segment."""
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def decodes_identically(path: Path) -> bool:
    """Returns True if a file is a JPEG or PNG, by its content, that every decoder decodes to the same pixels.

    Other files (CMYK, 16 bits, palettes, animations, other formats, truncated or empty files) must be read by PIL, the reference.
    Only the headers and the last bytes are read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG))
            if start.startswith(JPEG):
                file.seek(-2, 2)
                return file.read() == END_OF_IMAGE and _is_common_jpeg(file)
            if start == PNG:
                file.seek(-len(PNG_END), 2)
                return file.read() == PNG_END and _is_common_png(file)
    except OSError:
        pass
    return False


def _is_common_jpeg(file: BinaryIO) -> bool:
    file.seek(len(JPEG))
    while len(head := file.read(2)) == 2 and head[0] == 0xFF:
        marker = head[1]
        if marker == 0xFF:  # a fill byte
            file.seek(-1, 1)
            continue
        if marker in WITHOUT_SEGMENT:
            continue
        length = int.from_bytes(file.read(2), "big") - 2
        if marker == ADOBE:
            body = file.read(length)
            if body.startswith(b"Adobe") and body[11:12] != b"\x01":
                return False  # RGB or CMYK instead of YCbCr
        elif marker in FRAMES:
            body = file.read(length)
            supported = marker in (BASELINE, EXTENDED, PROGRESSIVE) and len(body) > 5 and body[0] == 8 and body[5] in (1, 3)
            return supported and _is_below_pixel_limit(body[1:3], body[3:5])
        elif marker == START_OF_SCAN or length < 0:
            return False
        else:
            file.seek(length, 1)
    return False


def _is_common_png(file: BinaryIO) -> bool:
    file.seek(len(PNG))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IHDR":
            body = file.read(length)
            depth, colour, interlaced = body[8], body[9], body[12]
            if depth != 8 or colour not in (0, 2) or interlaced or not _is_below_pixel_limit(body[:4], body[4:8]):
                return False
            file.seek(4, 1)
        elif kind in (b"acTL", b"tRNS"):
            return False
        elif kind == b"IDAT":
            return True
        else:
            file.seek(length + 4, 1)
    return False


def _is_below_pixel_limit(height: bytes, width: bytes) -> bool:
    return int.from_bytes(height, "big") * int.from_bytes(width, "big") <= MAX_PIXELS
