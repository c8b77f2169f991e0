"""Read images that are arrays rather than pictures: .npy files and 16-bit or many-channel TIFF, any channel count C.

They are stored as [H, W, C], [H, W] (C = 1) or, if only that fits, [C, H, W]. uint8 stays uint8. When the batch is
normalised, uint16 is divided by 65535 first, and float32 / float16 is taken as it is. All images of a data set have one
type of number.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mirl.dataloaders.decoding.tiff import TIFF_STARTS, is_picture_tiff, load_tiff
from mirl.dataloaders.errors import ImageError, one_line
from mirl.errors import UserError

_NPY_START = b"\x93NUMPY"
_KINDS = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32, "float16": np.float32}


@dataclass(frozen=True)
class ArrayFormat:
    """Every image of an array data set must have this format: C channels of `dtype` (uint8, uint16 or float32)."""

    channels: int
    dtype: np.dtype

    def read(self, data: bytes) -> np.ndarray:
        """Read [H, W, C] of dtype. ImageError, with the reason, if the file has another format, NaN or infinity."""
        array = self.arrange(_load(data, self.check))
        if array.dtype == np.float32 and not np.isfinite(array).all():
            count = array.size - int(np.count_nonzero(np.isfinite(array)))
            raise ImageError(f"{count} of its {array.size} numbers are NaN or infinite; fill them, or leave it out")
        return array

    def check(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raise ImageError unless an array of this shape and type of number is an image of the data set."""
        if _KINDS.get(dtype.name) != self.dtype:
            raise ImageError(f"its numbers are {dtype.name}, those of the data set {self.dtype.name}")
        if len(shape) == 2:
            shape = (*shape, 1)
        if len(shape) != 3 or self.channels not in (shape[2], shape[0]):
            raise ImageError(f"its shape is {shape}, expected [H, W, {self.channels}]")
        if min(shape) < 1:
            raise ImageError(f"its shape is {shape}")

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Check an array and bring it to [H, W, C] of dtype. Raises what `check` raises."""
        self.check(array.shape, array.dtype)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.shape[2] != self.channels:
            array = array.transpose(1, 2, 0)
        return np.ascontiguousarray(array, dtype=self.dtype)


def detect_array_format(data: bytes, path: str, channels: int) -> ArrayFormat | None:
    """Tell the format of a data set from its first file: None for pictures that DALI or Pillow decodes.

    A .npy file is always an array. A TIFF is an array if its numbers have neither 8 bits nor 1 bit, or if `channels` is
    not 1 or 3. The tags of a TIFF tell its kind of number, so that Pillow may read what tifffile cannot unpack.

    Raises:
        UserError: the channels asked for cannot come from this kind of file, or its numbers are of another type.
        ImageError: the file is damaged.
    """
    is_npy, is_tiff = data.startswith(_NPY_START), data.startswith(TIFF_STARTS)
    if not is_npy and not is_tiff:
        if channels not in (1, 3):
            raise UserError(
                f"channels is {channels}, but {path} is not an array file; "
                "pictures have 1 or 3 channels, others come as .npy or TIFF"
            )
        return None
    if is_tiff and channels in (1, 3) and is_picture_tiff(data):
        return None
    array = _load(data)
    kind = _KINDS.get(array.dtype.name)
    if kind is None:
        raise UserError(f"{path} holds {array.dtype.name}; arrays must be uint8, uint16, float16 or float32")
    found = ArrayFormat(channels, np.dtype(kind))
    try:
        found.check(array.shape, array.dtype)
    except ImageError as error:
        raise UserError(f"channels is {channels}, but of {path} {error}; set channels to what the files hold") from None
    return found


def as_resizable(pixels_HWC: np.ndarray) -> np.ndarray:
    """Bring pixels to a type that a resize takes: uint16 to float32 in 0..1; uint8 and float32 stay as they are."""
    return pixels_HWC.astype(np.float32) / np.float32(65535) if pixels_HWC.dtype == np.uint16 else pixels_HWC


def check_statistics(channels: int, mean_C: Sequence[float] | None, std_C: Sequence[float] | None) -> None:
    """Raise UserError unless mean, if given, and std, if given, have one number per channel, std above 0."""
    for name, values in (("mean", mean_C), ("std", std_C)):
        if values is not None and len(values) != channels:
            raise UserError(f"{name} has {len(values)} numbers, channels is {channels}; give one per channel")
    if std_C is not None and min(std_C) <= 0:
        raise UserError(f"std is {tuple(std_C)}, must be above 0 in every channel")


def normalise(x_BHWC: torch.Tensor, mean_C: Sequence[float] | None, std_C: Sequence[float] | None) -> torch.Tensor:
    """Return (x - mean) / std per channel, contiguous float32 [B, C, H, W]. If None, mean is 0 and std is 1."""
    mean = torch.tensor(mean_C if mean_C is not None else [0.0], dtype=torch.float32)
    std = torch.tensor(std_C if std_C is not None else [1.0], dtype=torch.float32)
    return ((x_BHWC - mean) / std).permute(0, 3, 1, 2).contiguous()


def _load(data: bytes, check: Callable[[tuple[int, ...], np.dtype], None] | None = None) -> np.ndarray:
    """Load the array of a file. check: called with a TIFF's shape and type before it is unpacked; raises ImageError."""
    if data.startswith(TIFF_STARTS):
        return load_tiff(data, check)
    if not data.startswith(_NPY_START):
        raise ImageError("neither a .npy nor a TIFF file" if data else "the file is empty")
    try:
        # A pickle is never loaded: loading one runs its code.
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged files
        raise ImageError(one_line(error)) from error
