"""Normalise the pixels of the kept patches: they are read once, and nothing else is materialised.

Letters: B batch, H W image, C channels, P patch side, N patches row by row, K kept ones, Q = P*P*C pixels of a patch in
(p, q, c) order.

Bytes at least: B*K*Q pixels read (1 each for uint8) and written (2 each for bfloat16); B = 256, 224 px, a quarter of
the patches: 29 MB.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirl.kernels.checks import FLOAT_DTYPES, check_device, check_ids, check_shape
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import TILE_WARPS, ceil_div, column_block, on_device_of, row_block
from mirl.kernels.pixels import (
    gather_patch_pixels,
    image_geometry,
    load_pixels,
    normalise_pixels,
    patch_base,
    pixel_scale_shift,
    row_table,
)
from mirl.kernels.registration import KernelOp
from mirl.kernels.triton_import import tl, triton


def gather_patches_reference(
    images: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    pixels_BKPX = gather_patch_pixels(images, ids_BK, patch_size, layout)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return normalise_pixels(pixels_BKPX, scale, shift, patch_size, compute).to(dtype).flatten(2)


@triton.jit
def _gather_patches_kernel(
    images_ptr, ids_ptr, scale_ptr, shift_ptr, out_ptr, rows, kept, grid_width, stride_b, stride_h, stride_w, stride_c,
    P: tl.constexpr, C: tl.constexpr, PIXEL_ROWS: tl.constexpr, NORMALISE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (offset[None, :] < P * P * C)
    patch = tl.load(ids_ptr + row, mask=row < rows, other=0)
    base = patch_base(patch, row // kept, grid_width, stride_b, stride_h, stride_w, P)
    pixel = load_pixels(
        images_ptr, base[:, None], offset[None, :], mask, scale_ptr, shift_ptr, stride_h, stride_w, stride_c,
        P, C, PIXEL_ROWS, NORMALISE,
    )  # fmt: skip
    out = out_ptr + row.to(tl.int64)[:, None] * (P * P * C) + offset[None, :]
    tl.store(out, pixel.to(out_ptr.dtype.element_ty), mask=mask)


def _gather_patches(
    images: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    geometry = image_geometry(images, patch_size, layout)
    batch, kept = ids_BK.shape
    pixels = patch_size * patch_size * geometry.channels
    out_BKQ = torch.empty(batch, kept, pixels, device=images.device, dtype=dtype)
    columns = column_block(pixels)
    rows = row_block(columns)
    with on_device_of(images):
        _gather_patches_kernel[(ceil_div(batch * kept, rows), ceil_div(pixels, columns))](
            images, ids_BK.contiguous(), row_table(scale, patch_size, images.device),
            row_table(shift, patch_size, images.device), out_BKQ, batch * kept, kept, geometry.grid_width,
            geometry.stride_b, geometry.stride_h, geometry.stride_w, geometry.stride_c,
            P=patch_size, C=geometry.channels, PIXEL_ROWS=geometry.pixel_rows, NORMALISE=len(scale) > 0,
            ROWS=rows, COLUMNS=columns, num_warps=TILE_WARPS,
        )  # fmt: skip
    return out_BKQ


def _fake(images, ids_BK, patch_size, scale, shift, layout, dtype):
    channels = images.shape[layout.index("C")]
    return images.new_empty(*ids_BK.shape, patch_size * patch_size * channels, dtype=dtype)


gather_patches_op = KernelOp(_gather_patches, _fake)


def gather_patches(
    images: Tensor,
    ids_keep_BK: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "BHWC",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return kept patches as rows of normalised pixels, [B, K, Q] in `dtype`. Not differentiable in the images.

    images       uint8 (0..255), normalised here as (value / 255 - mean[c]) / std[c]; or float, taken as they are
                 (mean and std None). [B, H, W, C] or, with layout="BCHW", [B, C, H, W]; any strides.
    ids_keep_BK  int64 patch numbers in [0, N).

    Example: a 4 x 4 image 0..15 of one channel with P = 2, ids [[1]], mean 0 and std 1 gives [[[2, 3, 6, 7]]] / 255.
    Raises: ValueError for sides that P does not divide, wrong shapes or dtypes, missing mean and std.
    """
    geometry = image_geometry(images, patch_size, layout)
    check_shape("ids_keep_BK", ids_keep_BK, (geometry.batch, None), "[B, K]")
    check_ids("ids_keep_BK", ids_keep_BK, geometry.patches)
    check_device(images, ids_keep_BK=ids_keep_BK)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}; float32, float16, bfloat16 or float64 is needed")
    scale, shift = pixel_scale_shift(images, mean, std, geometry.channels)
    if uses_triton(images) and dtype != torch.float64:
        return gather_patches_op(images, ids_keep_BK, patch_size, scale, shift, layout, dtype)
    return gather_patches_reference(images, ids_keep_BK, patch_size, scale, shift, layout, dtype)
