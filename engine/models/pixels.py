"""Turn images into patches and back, with the normalisations on the way.

Shapes: B batch, H W image, C channels, N patches (row-major), P patch side, Q = P * P * C in (p, q, c) order.
Images are uint8 [B, H, W, C], or floating point [B, C, H, W] and then already normalised per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VARIANCE_EPS = 1e-6  # the per-patch normalisation of MAE has the same


def image_layout(images: Tensor) -> str:
    """Return "BHWC" for uint8 images, "BCHW" for floating-point ones. ValueError for anything else."""
    if images.ndim != 4:
        raise ValueError(f"images have shape {list(images.shape)}: give uint8 [B, H, W, C] or float [B, C, H, W]")
    if images.dtype == torch.uint8:
        return "BHWC"
    if images.is_floating_point():
        return "BCHW"
    raise ValueError(f"images have dtype {images.dtype}: give uint8 [B, H, W, C] or normalised float [B, C, H, W]")


def normalise_images(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return [B, C, H, W] in ``dtype``: (value / 255 - mean) / std of uint8 images; floating-point ones as they are."""
    if image_layout(images) == "BCHW":
        return images.to(dtype)
    mean_C, std_C = (_filled(values, dtype, images.device) for values in (mean, std))
    return ((images.to(dtype) / 255 - mean_C) / std_C).permute(0, 3, 1, 2)


def _filled(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Write ``values`` [C] on ``device`` itself: a copy to a GPU would wait for all its pending work."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut [B, C, H, W] into patches [B, N, Q]."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    split = images_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches_BNQ: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put [B, N, Q] together to [B, C, H, W], the inverse of `patchify`; ``grid`` is patches down and across."""
    batch, _, pixels = patches_BNQ.shape
    rows, columns = grid
    channels = pixels // patch_size**2
    split = patches_BNQ.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def patch_statistics(patches_BNQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sqrt(variance + 1e-6) of each patch over its pixels, variance unbiased: two [B, N, 1]."""
    variance, mean = torch.var_mean(patches_BNQ, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def normalise_patches(patches_BNQ: Tensor) -> Tensor:
    """Make the target of the loss under ``norm_pix``: each patch with mean 0 and variance 1."""
    mean, deviation = patch_statistics(patches_BNQ)
    return (patches_BNQ - mean) / deviation


def denormalise_patches(predicted_BNQ: Tensor, true_patches_BNQ: Tensor) -> Tensor:
    """Invert `normalise_patches` for a prediction, with the mean and deviation of the *true* patches.

    A picture made this way shows structure that the model predicted, at a brightness and contrast that it was told.
    """
    mean, deviation = patch_statistics(true_patches_BNQ)
    return predicted_BNQ * deviation + mean


def to_uint8(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Invert `normalise_images`: [B, C, H, W] -> uint8 [B, H, W, C], clipped and rounded."""
    mean_C, std_C = (
        torch.tensor(tuple(values), dtype=torch.float32, device=images_BCHW.device) for values in (mean, std)
    )
    values_BHWC = images_BCHW.float().permute(0, 2, 3, 1) * std_C + mean_C
    return (values_BHWC.clamp(0, 1) * 255).round().to(torch.uint8)
