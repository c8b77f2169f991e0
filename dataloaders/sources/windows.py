"""Map the numbers of a scanner to 0..1 by a window of centre C and width W, with the three functions of DICOM.

https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.11.2.html
"""

from __future__ import annotations

import io

import numpy as np

from mirl.dataloaders.errors import ImageError

LINEAR, LINEAR_EXACT, SIGMOID = "LINEAR", "LINEAR_EXACT", "SIGMOID"


def windowed(x: np.ndarray, centre: float, width: float, function: str = LINEAR) -> np.ndarray:
    """Return float32 in 0..1 of the shape of x. ImageError if the function is unknown or the width too small for it."""
    if not width >= (1 if function == LINEAR else 0) or (width == 0 and function != LINEAR):
        raise ImageError(f"its window width is {width:g}, too small")
    x = x.astype(np.float64)
    if function == LINEAR and width == 1:
        y = (x > centre - 0.5).astype(np.float64)
    elif function == LINEAR:
        y = (x - (centre - 0.5)) / (width - 1) + 0.5
    elif function == LINEAR_EXACT:
        y = (x - centre) / width + 0.5
    elif function == SIGMOID:
        y = 1 / (1 + np.exp(-4 * (x - centre) / width))
    else:
        raise ImageError(f"its window function is {function!r}, not {LINEAR}, {LINEAR_EXACT} or {SIGMOID}")
    return np.clip(y, 0, 1).astype(np.float32)


def as_npy(array: np.ndarray) -> bytes:
    """Write a .npy file, the form in which arrays of numbers reach the decoders."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def as_stored(array: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """Put numbers into the window; without one keep uint8, uint16, float16 and float32, and make float32 of others."""
    if window is not None:
        return windowed(array, *window, LINEAR_EXACT)
    return array if array.dtype.name in ("uint8", "uint16", "float16", "float32") else array.astype(np.float32)
