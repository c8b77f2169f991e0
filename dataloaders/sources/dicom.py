"""Read DICOM files: every frame is an image, grey ones as float32 in 0..1, coloured ones as RGB of their integers.

Grey numbers are rescaled (slope and intercept, or a lookup table), then put into a window: the user's, or else the
first that the file has. Without a window the whole range that the stored bits can show becomes 0..1 (after a lookup
table: the range of the frame's values). In MONOCHROME1 small numbers are bright: such frames are inverted, so that
large is bright in every image.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mirl.dataloaders.errors import ImageError, one_line
from mirl.dataloaders.sources.containers import Reading, needed
from mirl.dataloaders.sources.patience import is_of_a_moment, patiently
from mirl.dataloaders.sources.windows import LINEAR, LINEAR_EXACT, as_npy, windowed

_FRAMES = ["NumberOfFrames", "Rows", "Columns"]
_GREY = [
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
]  # fmt: skip
_PALETTES = [
    f"{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue", "Alpha")
    for part in ("Descriptor", "Data")
] + [f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")]


def open_dicom(path: Path, reading: Reading) -> DicomFile:
    """Open the frames of one file. A file that cannot be read counts as one image, which is broken."""
    needed("pydicom", "medical", "DICOM files")
    return DicomFile(path, reading)


class DicomFile:
    """The members of a DICOM file are its frames; see `Container`."""

    classes = None
    has_labels = False

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self._window = os.fspath(path), reading.choice.window
        self.names, self.left_out = [""], []
        self._frames = 1
        try:
            header = patiently(self._header, self.path)
            if "Rows" not in header:
                self.names, self.left_out = [], [("", "DICOM without pixels")]
                return
            self._frames = int(header.get("NumberOfFrames") or 1)
        except Exception as error:  # pydicom raises many types; reading the image will raise again
            if isinstance(error, OSError) and is_of_a_moment(error):
                raise
            return
        if self._frames > 1:
            self.names = [str(frame) for frame in range(self._frames)]

    def read(self, number: int) -> bytes:
        try:
            return as_npy(patiently(partial(self._frame, number), self.path))
        except FileNotFoundError:
            raise ImageError("the file no longer exists") from None
        except ImageError:
            raise
        except Exception as error:  # pydicom raises many types
            raise ImageError(one_line(error)) from error

    def label(self, number: int) -> int:
        raise ImageError("a DICOM file has no class number")

    def _header(self) -> Any:
        import pydicom

        return pydicom.dcmread(self.path, stop_before_pixels=True, specific_tags=_FRAMES)

    def _frame(self, number: int) -> np.ndarray:
        """Read a frame: float32 [H, W] in 0..1, or [H, W, 3] of the integers of a coloured file."""
        from pydicom import pixels
        from pydicom.dataset import Dataset

        header = Dataset()
        pixels_HW = pixels.pixel_array(
            self.path, ds_out=header, specific_tags=_tags(), index=number if self._frames > 1 else None
        )
        kind = header.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            return pixels.apply_color_lut(pixels_HW, header)
        if header.SamplesPerPixel > 1:
            return pixels_HW
        low, high = _stored_range(header)
        if "ModalityLUTSequence" in header:
            values = pixels.apply_modality_lut(pixels_HW, header)
            low, high = float(values.min()), float(values.max())
        else:
            slope = _first(_of_frame(header, number, "PixelValueTransformationSequence", "RescaleSlope"), 1.0)
            intercept = _first(_of_frame(header, number, "PixelValueTransformationSequence", "RescaleIntercept"), 0.0)
            values = pixels_HW.astype(np.float64) * slope + intercept
            low, high = sorted((low * slope + intercept, high * slope + intercept))
        y = self._in_window(header, number, values, low, high)
        return 1 - y if kind == "MONOCHROME1" else y

    def _in_window(self, header: Any, number: int, values: np.ndarray, low: float, high: float) -> np.ndarray:
        if self._window is not None:
            return windowed(values, *self._window, LINEAR_EXACT)
        centre = _of_frame(header, number, "FrameVOILUTSequence", "WindowCenter")
        width = _of_frame(header, number, "FrameVOILUTSequence", "WindowWidth")
        if centre is None or width is None:
            return ((values - low) / max(high - low, 1e-12)).astype(np.float32)
        function = _of_frame(header, number, "FrameVOILUTSequence", "VOILUTFunction")
        return windowed(values, _first(centre, 0.0), _first(width, 0.0), str(function or LINEAR))


@lru_cache(maxsize=1)
def _tags() -> list[int]:
    """Return the tags that are read beside the pixels; `pixel_array` does not know keywords."""
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in _GREY + _PALETTES]


def _stored_range(header: Any) -> tuple[float, float]:
    """Return the least and the greatest number that the stored bits can show."""
    bits = int(header.get("BitsStored") or header.get("BitsAllocated") or 16)
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if header.get("PixelRepresentation") else (0.0, 2.0**bits - 1)


def _of_frame(header: Any, number: int, sequence: str, keyword: str) -> Any:
    """Find an attribute of the file, or, as enhanced files have it, of this frame or shared by all frames."""
    if (value := header.get(keyword)) not in (None, ""):
        return value
    groups = list(header.get("PerFrameFunctionalGroupsSequence") or [])[number : number + 1]
    groups += list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    for group in groups:
        for item in list(group.get(sequence) or [])[:1]:
            if (value := item.get(keyword)) not in (None, ""):
                return value
    return None


def _first(value: Any, default: float) -> float:
    """Return the number, or the first of several, as a float."""
    if value is None:
        return default
    values = value if isinstance(value, list | tuple) or hasattr(value, "__iter__") else [value]
    return float(next(iter(values)))
