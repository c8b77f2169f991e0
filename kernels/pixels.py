"""Read the pixels of chosen patches through the strides of the images: for gather_patches and masked_residual_mse.

Letters: B batch, H W image, C channels, P patch side, N = (H/P) * (W/P) patches row by row, K chosen ones,
Q = P*P*C pixels of a patch in (p, q, c) order: patch row, patch column, channel (fastest).

Example, P = 2, C = 1, a 4 x 4 image 0..15 row by row: N = 4 and patch 1 is the upper right one, pixels [2, 3, 6, 7].
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mirl.kernels.triton_import import tl, triton

LAYOUTS = ("BHWC", "BCHW")


class ImageGeometry(NamedTuple):
    """An image batch has these sizes and element strides, whatever its layout in memory."""

    batch: int
    channels: int
    grid_height: int
    grid_width: int
    stride_b: int
    stride_h: int
    stride_w: int
    stride_c: int

    @property
    def patches(self) -> int:
        return self.grid_height * self.grid_width

    @property
    def pixel_rows(self) -> bool:
        """Say whether the P*C values of one row of a patch are neighbours in memory and in (q, c) order."""
        return self.stride_c == 1 and self.stride_w == self.channels


def image_geometry(images: Tensor, patch_size: int, layout: str) -> ImageGeometry:
    """Check `images` ([B, H, W, C] or [B, C, H, W], uint8 or float) against the patch side.

    Raises: ValueError for an unknown layout, a wrong number of dimensions or dtype, a side that P does not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if images.dim() != 4:
        raise ValueError(f"images has shape {list(images.shape)}; four dimensions {layout} are needed")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise ValueError(f"images has dtype {images.dtype}; uint8 (0..255) or a float type (normalised) is needed")
    axes = {letter: layout.index(letter) for letter in "BHWC"}
    height, width = images.shape[axes["H"]], images.shape[axes["W"]]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of patch_size={patch_size}")
    return ImageGeometry(
        batch=images.shape[axes["B"]],
        channels=images.shape[axes["C"]],
        grid_height=height // patch_size,
        grid_width=width // patch_size,
        stride_b=images.stride(axes["B"]),
        stride_h=images.stride(axes["H"]),
        stride_w=images.stride(axes["W"]),
        stride_c=images.stride(axes["C"]),
    )


def pixel_scale_shift(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Return scale and shift: normalised = pixel * scale[c] + shift[c]. Two empty lists mean "as they are" (float).

    (value / 255 - mean) / std = value * (1 / (255 std)) - mean / std for uint8. Float images were normalised before.
    Raises: ValueError when mean and std are missing for uint8, given for floats, or not C positive numbers.
    """
    if images.dtype != torch.uint8:
        if mean is not None or std is not None:
            raise ValueError(
                f"images of dtype {images.dtype} are taken as normalised; leave mean and std None for them"
            )
        return [], []
    if mean is None or std is None:
        raise ValueError("uint8 images need mean and std, one value per channel in units of 0..1")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} values; images have {channels} channels")
    if min(std) <= 0:
        raise ValueError(f"std is {tuple(std)}; every value must be above 0")
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


@lru_cache(maxsize=64)
def device_floats(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a small constant on the device, copied there once a process: a training step copies nothing to it.

    inference_mode(False) because a tensor cached from inside inference mode could not be used by autograd later.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def row_table(values: Sequence[float], patch_size: int, device: torch.device) -> Tensor:
    """Repeat one value a channel to [P*C], one a pixel of a patch row: `load_pixels` reads four neighbours at once."""
    return device_floats(tuple(values) * patch_size, device)


def gather_patch_pixels(images: Tensor, ids_BK: Tensor, patch_size: int, layout: str) -> Tensor:
    """Copy the chosen patches in plain torch -> [B, K, P, P*C] in the dtype of `images`, in (p, q, c) order."""
    geometry = image_geometry(images, patch_size, layout)
    row_BK = torch.div(ids_BK, geometry.grid_width, rounding_mode="floor")
    column_BK = ids_BK - row_BK * geometry.grid_width
    batch = torch.arange(geometry.batch, device=images.device)
    if images.is_contiguous() and layout == "BHWC":
        # The P*C values of a patch row are neighbours: index_select of such rows is three times as fast as indexing.
        height = geometry.grid_height * patch_size
        line_BKP = (batch[:, None] * height + row_BK * patch_size)[..., None] + torch.arange(
            patch_size, device=images.device
        )
        lines = images.view(-1, patch_size * geometry.channels)
        chosen = (line_BKP * geometry.grid_width + column_BK[..., None]).flatten()
        return lines.index_select(0, chosen).view(*ids_BK.shape, patch_size, -1)
    grid = (geometry.grid_height, patch_size), (geometry.grid_width, patch_size)
    if layout == "BHWC":
        return images.unflatten(2, grid[1]).unflatten(1, grid[0])[batch[:, None], row_BK, :, column_BK].flatten(3)
    patches_BKCPP = images.unflatten(3, grid[1]).unflatten(2, grid[0])[batch[:, None], :, row_BK, :, column_BK]
    return patches_BKCPP.permute(0, 1, 3, 4, 2).flatten(3)


def normalise_pixels(
    pixels_BKPX: Tensor, scale: Sequence[float], shift: Sequence[float], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """Cast [B, K, P, P*C] to `dtype` (float32 or float64); scale and shift it per channel if a scale is given.

    The constants are repeated to a patch row, because torch vectorises over the last axis: C alone would be too short.
    """
    pixels_BKPX = pixels_BKPX.to(dtype)
    if not len(scale):
        return pixels_BKPX
    scale_X, shift_X = (pixels_BKPX.new_tensor(list(values) * patch_size) for values in (scale, shift))
    return torch.addcmul(shift_X, pixels_BKPX, scale_X)


@triton.jit
def load_pixels(
    images_ptr, base, offset, mask, scale_ptr, shift_ptr, stride_h, stride_w, stride_c,
    P: tl.constexpr, C: tl.constexpr, PIXEL_ROWS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Load as float32 the pixels at `offset` (0..Q-1 in (p, q, c) order) of the patch that begins at `base` (int64).

    scale, shift: a `row_table` each. With PIXEL_ROWS the compiler sees that P*C neighbouring offsets are neighbours in
    memory, and loads 16 bytes at once.
    """
    in_row = offset % (P * C)
    if PIXEL_ROWS:
        address = base + (offset // (P * C)) * stride_h + in_row
    else:
        address = base + (offset // (P * C)) * stride_h + (in_row // C) * stride_w + (in_row % C) * stride_c
    pixel = tl.load(images_ptr + address, mask=mask, other=0).to(tl.float32)
    if NORMALISE:
        pixel = pixel * tl.load(scale_ptr + in_row) + tl.load(shift_ptr + in_row)
    return pixel


@triton.jit
def patch_base(patch, batch, grid_width, stride_b, stride_h, stride_w, P: tl.constexpr):
    """Return the element offset (int64) of the first pixel of patch number `patch` (int64) of image number `batch`."""
    row = patch // grid_width
    column = patch - row * grid_width
    return batch.to(tl.int64) * stride_b + row * P * stride_h + column * P * stride_w
