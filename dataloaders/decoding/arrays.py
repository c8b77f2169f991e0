"""Images that are arrays rather than pictures: .npy files and 16-bit or many-channel TIFF, for any channel count C.

Stored as [H, W, C], [H, W] (C = 1) or, if only that fits, [C, H, W]. uint8 stays uint8; uint16 is divided by 65535 and
float32 / float16 taken as it is when the batch is normalised. All images of a data set have one type of number.
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
    """What every image of an array data set must be: C channels of `dtype` (uint8, uint16 or float32)."""

    channels: int
    dtype: np.dtype

    def read(self, data: bytes) -> np.ndarray:
        """[H, W, C] of dtype; ImageError with the reason if the file is something else or holds NaN or infinity."""
        array = self.arrange(_load(data, self.check))
        if array.dtype == np.float32 and not np.isfinite(array).all():
            count = array.size - int(np.count_nonzero(np.isfinite(array)))
            raise ImageError(f"{count} of its {array.size} numbers are NaN or infinite; fill them, or leave it out")
        return array

    def check(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """ImageError unless an array of this shape and type of number is an image of the data set."""
        if _KINDS.get(dtype.name) != self.dtype:
            raise ImageError(f"its numbers are {dtype.name}, those of the data set {self.dtype.name}")
        if len(shape) == 2:
            shape = (*shape, 1)
        if len(shape) != 3 or self.channels not in (shape[2], shape[0]):
            raise ImageError(f"its shape is {shape}, expected [H, W, {self.channels}]")
        if min(shape) < 1:
            raise ImageError(f"its shape is {shape}")

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """[H, W, C] of dtype from an array that passes `check`."""
        self.check(array.shape, array.dtype)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.shape[2] != self.channels:
            array = array.transpose(1, 2, 0)
        return np.ascontiguousarray(array, dtype=self.dtype)


def detect_array_format(data: bytes, path: str, channels: int) -> ArrayFormat | None:
    """The format of a data set from its first file: None for pictures that DALI or Pillow decodes.

    .npy is always an array; TIFF is one if its numbers are not 8 bits or 1 bit, or `channels` is not 1 or 3; of TIFF
    that is told by its tags, so that Pillow may read what tifffile cannot unpack. UserError if the channels asked for
    cannot come from this kind of file.
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
    """uint8 as it is, uint16 as float32 in 0..1, float32 as it is: the types that a resize takes."""
    return pixels_HWC.astype(np.float32) / np.float32(65535) if pixels_HWC.dtype == np.uint16 else pixels_HWC


def check_statistics(channels: int, mean_C: Sequence[float] | None, std_C: Sequence[float] | None) -> None:
    """UserError unless mean and std are both absent or have one number per channel, std above 0."""
    for name, values in (("mean", mean_C), ("std", std_C)):
        if values is not None and len(values) != channels:
            raise UserError(f"{name} has {len(values)} numbers, channels is {channels}; give one per channel")
    if std_C is not None and min(std_C) <= 0:
        raise UserError(f"std is {tuple(std_C)}, must be above 0 in every channel")


def normalise(x_BHWC: torch.Tensor, mean_C: Sequence[float] | None, std_C: Sequence[float] | None) -> torch.Tensor:
    """Contiguous float32 [B, C, H, W]: (x - mean) / std per channel; mean 0 and std 1 where they are None."""
    mean = torch.tensor(mean_C if mean_C is not None else [0.0], dtype=torch.float32)
    std = torch.tensor(std_C if std_C is not None else [1.0], dtype=torch.float32)
    return ((x_BHWC - mean) / std).permute(0, 3, 1, 2).contiguous()


def _load(data: bytes, check: Callable[[tuple[int, ...], np.dtype], None] | None = None) -> np.ndarray:
    """The array of a file. check: called with shape and type of a TIFF before it is unpacked; raises ImageError."""
    if data.startswith(TIFF_STARTS):
        return load_tiff(data, check)
    if not data.startswith(_NPY_START):
        raise ImageError("neither a .npy nor a TIFF file" if data else "the file is empty")
    try:
        # Never a pickle: loading one runs what it says.
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # of many types on damaged files
        raise ImageError(one_line(error)) from error
