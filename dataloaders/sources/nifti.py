"""Read NIfTI volumes: every slice is an image, float32 of the numbers as the header scales them, or 0..1 in a window.

A volume is turned, without resampling, to the axes right, anterior, superior that its header tells of, so that slices
of differently stored volumes look alike. Slices are axial unless coronal or sagittal is chosen. The first row of a
slice is anterior (axial) or superior, its first column left (axial, coronal) or posterior (sagittal).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mirl.dataloaders.errors import ImageError, one_line
from mirl.dataloaders.sources.block_cache import BLOCKS
from mirl.dataloaders.sources.containers import AXES, Reading, needed
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import is_of_a_moment, patiently
from mirl.dataloaders.sources.windows import LINEAR_EXACT, as_npy, windowed
from mirl.errors import UserError


def open_nifti(path: Path, reading: Reading) -> NiftiFile:
    """Open the slices of one file, called SLICE, or VOLUME/SLICE. UserError if it is no volume of real numbers."""
    needed("nibabel", "medical", "NIfTI files")
    return NiftiFile(path, reading)


class NiftiFile:
    """The members of a NIfTI file are its slices; see `Container`."""

    classes = None
    has_labels = False
    left_out = ()

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self._window = os.fspath(path), reading.choice.window
        self._axis = AXES.index(reading.choice.axis or AXES[-1])
        try:
            shape, kind = patiently(self._shape, self.path)
        except Exception as error:  # nibabel raises many types
            if isinstance(error, OSError) and (is_of_a_moment(error) or isinstance(error, PermissionError)):
                raise
            raise UserError(f"NIfTI file {shown(path)} cannot be read ({one_line(error)}): check it") from None
        if len(shape) not in (3, 4) or kind.names is not None or kind.kind not in "iuf":
            raise UserError(f"{shown(path)} holds {kind} {list(shape)}: give real numbers [X, Y, Z] or [X, Y, Z, T]")
        self._slices = shape[self._axis]
        volumes = shape[3] if len(shape) == 4 else 1
        self.names = [
            f"{volume}/{number}" if len(shape) == 4 else str(number)
            for volume in range(volumes)
            for number in range(self._slices)
        ]

    def read(self, number: int) -> bytes:
        volume, place = divmod(number, self._slices)
        volume_XYZ = BLOCKS.get((self.path, volume), partial(self._volume, volume))
        slice_HW = np.take(volume_XYZ, place, axis=self._axis).T[::-1]
        return as_npy(slice_HW if self._window is None else windowed(slice_HW, *self._window, LINEAR_EXACT))

    def label(self, number: int) -> int:
        raise ImageError("a NIfTI file has no class number")

    def _image(self) -> Any:
        import nibabel

        return nibabel.load(self.path)

    def _shape(self) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape in the order right, anterior, superior, and the stored type. Only the header is read."""
        import nibabel

        image = self._image()
        stored = tuple(image.shape)
        if len(stored) not in (3, 4):
            return stored, image.get_data_dtype()
        order = nibabel.io_orientation(image.affine)[:, 0].astype(int).tolist()
        turned = [0, 0, 0]
        for axis, place in enumerate(order):
            turned[place] = stored[axis]
        return (*turned, *stored[3:]), image.get_data_dtype()

    def _volume(self, volume: int) -> tuple[np.ndarray, int]:
        """Read one volume, float32 [X, Y, Z] along right, anterior, superior, and count its bytes."""
        try:
            array = patiently(partial(self._volume_once, volume), self.path)
        except FileNotFoundError:
            raise ImageError("the file no longer exists") from None
        except Exception as error:  # nibabel and zlib raise many types
            if isinstance(error, ImageError):
                raise
            raise ImageError(one_line(error)) from error
        return array, array.nbytes

    def _volume_once(self, volume: int) -> np.ndarray:
        import nibabel

        image = self._image()
        if len(image.shape) == 4:
            image = image.slicer[..., volume : volume + 1]
        turned = nibabel.as_closest_canonical(image).get_fdata(dtype=np.float32, caching="unchanged")
        return turned[..., 0] if turned.ndim == 4 else turned
