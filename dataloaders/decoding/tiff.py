"""Read the tags and the numbers of TIFF files, by tifffile or, if it lacks the compression, by Pillow.

tifffile reads every type of number and any count of channels, but LZW, JPEG and fax compression only with a further
package. Pillow reads all of these compressions, but not all types of number.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import tifffile
from PIL import Image

from mirl.dataloaders.decoding.headers import check_pixels
from mirl.dataloaders.errors import ImageError, one_line

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURE_MODES = frozenset(["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])


def is_picture_tiff(data: bytes) -> bool:
    """Say whether a TIFF's tags promise 8 bits or 1 bit a number. Nothing is unpacked. ImageError if it is no TIFF."""
    try:
        _, dtype = _describe(data)
        return dtype.name in ("uint8", "bool")
    except ImageError as error:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.mode in _PICTURE_MODES
        except Exception:  # Pillow's plug-ins raise almost anything on damaged files
            raise error from None


def load_tiff(data: bytes, check: Callable[[tuple[int, ...], np.dtype], None] | None = None) -> np.ndarray:
    """Return the array of a file. check: called with shape and type before anything is unpacked; raises ImageError.

    ImageError if the file is damaged, has too many pixels, or neither library can unpack it.
    """
    shape, dtype = _describe(data)
    if check is not None:
        check(shape, dtype)
    # [H, W], [H, W, C] or [C, H, W]: the sides are the two largest, or the image is larger still.
    check_pixels(*(sorted(shape)[-2:] if len(shape) > 1 else (1, *shape)))
    try:
        return tifffile.imread(io.BytesIO(data))
    except Exception as error:  # tifffile raises many types on damaged files
        array = _load_with_pillow(data)
        if array is None or array.shape != shape or array.dtype != dtype:
            raise ImageError(one_line(error)) from error
        return array


def _describe(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of the first series, in the byte order of this machine."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            if series.dtype is None:
                raise ImageError("a TIFF whose numbers are of an unknown type")
            return tuple(series.shape), np.dtype(series.dtype).newbyteorder("=")
    except ImageError:
        raise
    except Exception as error:  # tifffile raises many types on damaged files
        raise ImageError(one_line(error)) from error


def _load_with_pillow(data: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.asarray(image)
    except Exception:  # the other library's reason is told
        return None
    return array.astype(array.dtype.newbyteorder("="), copy=False)
