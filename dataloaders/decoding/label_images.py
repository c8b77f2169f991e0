"""Read label images, one whole number a pixel as it is stored, and the sizes of images from their headers."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from mirl.dataloaders.decoding.headers import check_pixels, max_pixels
from mirl.dataloaders.errors import ImageError, one_line

_ORIENTATION = 0x0112
_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I", "F")


def read_label_image(data: bytes) -> np.ndarray:
    """Read raw values, [H, W] of uint8 or uint16, upright; a palette image gives its indices.

    ImageError for a file that cannot be read, one with several numbers a pixel, and one whose format loses values.
    """
    max_pixels()
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image.height, image.width)
            if image.mode not in _MODES:
                raise ImageError(
                    f"it has {len(image.getbands())} numbers a pixel ({image.mode}), a label image has one: write "
                    "class numbers into a grey or palette PNG"
                )
            if image.format in ("JPEG", "WEBP", "GIF") and image.mode != "P":
                raise ImageError(f"it is {image.format}, which does not keep numbers as they were: give a PNG")
            image.load()
            pixels_HW = np.asarray(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        raise ImageError(one_line(error)) from error
    if pixels_HW.dtype == bool:
        return pixels_HW.astype(np.uint8)
    if pixels_HW.dtype.kind == "f" or pixels_HW.min() < 0 or pixels_HW.max() > 65535:
        raise ImageError(f"its values are {pixels_HW.min()} to {pixels_HW.max()}: label values are whole, 0 to 65535")
    return pixels_HW.astype(np.uint8 if pixels_HW.max() < 256 else np.uint16)


def upright_size(path: str) -> tuple[int, int]:
    """Return (height, width) of an image file as viewers show it. Nothing is decoded. ImageError if it is no image."""
    max_pixels()
    try:
        with Image.open(path) as image:
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in range(5, 9)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
        raise ImageError(one_line(error)) from error
