"""Read HDF5 files: the images of one dataset of numbers, [N, H, W], [N, H, W, C], or one image [H, W] or [H, W, C].

A dataset with three axes is one image, with channels last, if its last axis is 1, 3 or 4. uint8, uint16, float16 and
float32 are taken as they are, other real numbers as float32; a window, if one is given, makes 0..1 of them. An image is
called FILE::KEY/NUMBER, or FILE::KEY.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mirl.dataloaders.errors import ImageError, one_line
from mirl.dataloaders.sources.containers import Reading, needed
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import is_of_a_moment, patiently
from mirl.dataloaders.sources.windows import as_npy, as_stored
from mirl.errors import UserError

_LABELS = ("label", "labels", "y")
_CHANNELS = (1, 3, 4)


def open_hdf5(path: Path, reading: Reading) -> Hdf5File:
    """Open the images of one dataset. UserError if the file has none, or several and none is chosen."""
    h5py = needed("h5py", "medical", "HDF5 files")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return Hdf5File(path, file, reading)
    except UserError:
        raise
    except OSError as error:
        if is_of_a_moment(error) or isinstance(error, PermissionError):
            raise
        raise UserError(f"HDF5 file {shown(path)} cannot be read ({one_line(error)}): check it") from None


class Hdf5File:
    """The members of an HDF5 file are the images of one of its datasets; see `Container`."""

    classes = None
    left_out = ()

    def __init__(self, path: Path, file: Any, reading: Reading) -> None:
        self.path, self._window = os.fspath(path), reading.choice.window
        found = _datasets(file)
        self._key = _image_key(self.path, found, reading.choice.images)
        dataset = found[self._key]
        self._many = dataset.ndim == 4 or (dataset.ndim == 3 and dataset.shape[-1] not in _CHANNELS)
        count = dataset.shape[0] if self._many else 1
        self.names = [f"{self._key}/{number}" for number in range(count)] if self._many else [self._key]
        self._labels = _labels(self.path, found, reading.choice.labels, count) if reading.labels else None
        self.has_labels = self._labels is not None

    def read(self, number: int) -> bytes:
        try:
            return as_npy(as_stored(patiently(partial(self._array, number), self.path), self._window))
        except FileNotFoundError:
            raise ImageError("the file no longer exists") from None
        except ImageError:
            raise
        except Exception as error:  # h5py raises many types
            raise ImageError(one_line(error)) from error

    def label(self, number: int) -> int:
        assert self._labels is not None
        label = int(self._labels[number])
        if label < 0:
            raise ImageError(f"its label is {label}, not a class number")
        return label

    def _array(self, number: int) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r", locking=False) as file:
            dataset: Any = file[self._key]
            return np.asarray(dataset[number] if self._many else dataset[()])


def _datasets(file: Any) -> dict[str, Any]:
    """Find every dataset of real numbers by its key, in the order of the keys."""
    import h5py

    found: dict[str, Any] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.names is None and item.dtype.kind in "iuf":
            found[key] = item

    file.visititems(visit)
    return dict(sorted(found.items()))


def _image_key(path: str, found: dict[str, Any], chosen: str) -> str:
    images = {key: item for key, item in found.items() if 2 <= item.ndim <= 4 and min(item.shape) > 0}
    told = ", ".join(f"{key} {list(item.shape)}" for key, item in list(found.items())[:8])
    if chosen:
        chosen = chosen.strip("/")
        if chosen not in images:
            raise UserError(f"{shown(path)} has no dataset {chosen!r} of images: give one of {shown(told)}")
        return chosen
    if not images:
        raise UserError(f"{shown(path)} has no dataset of images, [N, H, W] or [N, H, W, C]; it has {shown(told)}")
    if len(images) > 1:
        raise UserError(
            f"{shown(path)} has {len(images)} datasets that may be images ({shown(told)}): choose one, "
            f"{shown(path)}:{shown(next(iter(images)))}"
        )
    return next(iter(images))


def _labels(path: str, found: dict[str, Any], chosen: str, count: int) -> np.ndarray | None:
    key = chosen.strip("/") or next((name for name in _LABELS if name in found), "")
    if not key:
        return None
    if key not in found or found[key].size != count or found[key].dtype.kind not in "iu":
        raise UserError(f"{shown(path)} has no dataset {key!r} of {count} class numbers: give another for the labels")
    return np.asarray(found[key][()]).reshape(-1).astype(np.int64)
