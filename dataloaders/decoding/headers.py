"""Read the size of an encoded image from its first bytes, and check that it is whole. A whole image is not decoded.

The EXIF orientation is applied on every path of this package: an image is as a viewer shows it, and sizes and crop
windows are in upright pixels. DALI's decoders do the same, Pillow does through ImageOps.exif_transpose. (torchvision's
ImageFolder ignores the tag; few files of ImageNet have one that matters.)

JPEG, PNG and plain WEBP headers are parsed here, in about 10 us, since every image that is trained on passes through.
Images of all other formats are rare and are decoded by Pillow. DALI knows some of these formats, but it may decode one
window of a damaged TIFF and refuse another, and it knows neither GIF nor extended WEBP. Pillow also gets the files that
this parser does not understand (some cameras write stray bytes between the segments of a JPEG): an image is broken only
if no decoder reads it.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from mirl.dataloaders.errors import ImageError, one_line
from mirl.errors import UserError

# An environment variable rather than a setting: it reaches every command, every rank and Pillow, on one path.
LIMIT_VARIABLE = "MIRL_MAX_IMAGE_PIXELS"

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_LENGTH = frozenset([0x01, *range(0xD0, 0xD9)])
_TAIL = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """A header says format name, upright height and width in pixels, and whether DALI decodes this kind of file."""

    format: str
    height: int
    width: int
    native: bool


@lru_cache(maxsize=1)
def max_pixels() -> int:
    """Return how many pixels an image may have, against decompression bombs: by default the number where Pillow raises.

    MIRL_MAX_IMAGE_PIXELS in the environment sets another, for Pillow too. UserError if its value is no number above 0.
    """
    # Pillow warns at MAX_IMAGE_PIXELS and raises at twice that number.
    default = 2 * (Image.MAX_IMAGE_PIXELS or 2**29)
    text = os.environ.get(LIMIT_VARIABLE, "").replace("_", "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(
            f"{LIMIT_VARIABLE} is {os.environ[LIMIT_VARIABLE]!r}: give a number of pixels, such as 400000000"
        )
    if int(text) > default and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = -(-int(text) // 2)
    return int(text)


def check_pixels(height: int, width: int) -> None:
    """Raise ImageError unless an image of this size may be decoded. The error names the limit and how to move it."""
    if height < 1 or width < 1:
        raise ImageError(f"its header says {height} x {width} pixels")
    if height * width > max_pixels():
        raise ImageError(
            f"its header says {height} x {width} pixels, {height * width} in all, more than the limit of "
            f"{max_pixels()}: cut or shrink it, or export {LIMIT_VARIABLE}={height * width}"
        )


def read_header(data: bytes) -> Header:
    """Read the header of an encoded image. ImageError, with the reason, if it is not an image or is cut short.

    A file that looks cut short is decoded, because whether an image is broken must not depend on the window.
    """
    if not data:
        raise ImageError("the file is empty")
    max_pixels()  # raises Pillow's own limit before Pillow opens anything
    if data[:3] == b"\xff\xd8\xff":
        header, whole = _parsed(_read_jpeg, data), _ends_with_marker(data, b"\xff\xd9")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        header, whole = _parsed(_read_png, data), _ends_with_marker(data, b"IEND")
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":
        header = _parsed(_read_webp_lossy, data)
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    else:
        header, whole = _read_with_pillow(data), True
    check_pixels(header.height, header.width)
    if not whole:
        # Decoding a window near the top of a cut file can succeed, so the whole image is tried.
        decode_with_pillow(data)
    return header


def decode_with_pillow(data: bytes, channels: int = 3) -> np.ndarray:
    """Decode the whole upright image: uint8 [H, W, channels] (1 or 3). ImageError if Pillow cannot decode all of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I;16", "I;16B", "I;16L", "I"):
                # Pillow would clip 16-bit grey to 255.
                grey_HW = np.asarray(upright).astype(np.int64)
                if grey_HW.min() < 0 or grey_HW.max() > 65535:
                    raise ImageError(f"its values are {grey_HW.min()} to {grey_HW.max()}, a picture's are 0 to 65535")
                upright = Image.fromarray((grey_HW // 257).astype(np.uint8))
            elif upright.mode == "F":
                # Pillow would clip floats to whole numbers: values in 0..1 would be black.
                raise ImageError("its numbers are floats, those of the data set 8-bit pictures")
            pixels = np.asarray(upright.convert("RGB" if channels == 3 else "L"))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        raise ImageError(one_line(error)) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def as_portable_pixmap(pixels_HWC: np.ndarray) -> bytes:
    """Write uint8 pixels as an uncompressed PPM (C = 3) or PGM (C = 1) file: so DALI gets decoded images."""
    height, width, channels = pixels_HWC.shape
    return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + pixels_HWC.tobytes()


def _ends_with_marker(data: bytes, marker: bytes) -> bool:
    return data.endswith(marker) or data.rfind(marker, max(0, len(data) - _TAIL)) >= 0


def _parsed(parse: Callable[[bytes], Header], data: bytes) -> Header:
    """Read the header by our own parser. If it gives up, Pillow reads it, and then also decodes the image."""
    try:
        return parse(data)
    except ImageError as error:
        try:
            return _read_with_pillow(data)
        except ImageError:
            raise error from None


def _upright(name: str, height: int, width: int, orientation: int, native: bool = True) -> Header:
    return Header(name, width, height, native) if 5 <= orientation <= 8 else Header(name, height, width, native)


def _read_jpeg(data: bytes) -> Header:
    at, end, orientation = 2, len(data), 1
    while at + 4 <= end:
        if data[at] != 0xFF:
            raise ImageError("damaged JPEG header")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        elif marker in _START_OF_FRAME and at + 9 <= end:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _upright("JPEG", height, width, orientation)
        elif marker == 0xDA:
            break
        else:
            if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _exif_orientation(data, at + 10)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ImageError("JPEG without a frame header")


def _read_png(data: bytes) -> Header:
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageError("damaged PNG header")
    width, height = struct.unpack_from(">II", data, 16)
    at, orientation = 33, 1
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IDAT":
            break
        if kind == b"eXIf":
            orientation = _exif_orientation(data, at + 8)
        at += 12 + length
    return _upright("PNG", height, width, orientation)


def _read_webp_lossy(data: bytes) -> Header:
    if len(data) < 30:
        raise ImageError("damaged WEBP header")
    width, height = struct.unpack_from("<HH", data, 26)
    return Header("WEBP", height & 0x3FFF, width & 0x3FFF, True)


def _read_with_pillow(data: bytes) -> Header:
    try:
        with Image.open(io.BytesIO(data)) as image:
            # For a TIFF, Pillow gives the upright size before it has decoded anything.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
            return _upright(image.format or "?", image.height, image.width, orientation, native=False)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{one_line(error)}: cut or shrink it, or export {LIMIT_VARIABLE}=PIXELS") from error
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        start = data[:64].lstrip()
        if start.startswith(b"<"):
            raise ImageError("not an image: an HTML or XML page") from error
        raise ImageError("not an image of a known format") from error


def _exif_orientation(data: bytes, start: int) -> int:
    """Read tag 0x0112 from the first directory of the EXIF block (a TIFF header) at `start`; 1 (upright) if absent."""
    order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2])
    if order is None or start + 8 > len(data):
        return 1
    at = start + struct.unpack_from(order + "I", data, start + 4)[0]
    if at + 2 > len(data):
        return 1
    (count,) = struct.unpack_from(order + "H", data, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(data) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag == 0x0112:
            return struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)[0]
    return 1
