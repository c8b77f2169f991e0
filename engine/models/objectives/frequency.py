"""The two frequency parts of an image that the objectives coarse_to_fine and fine_to_coarse hand out (Table 2e)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TRUNCATE = 4.0  # the filter ends at this many sigma


def split_frequencies(images_BCHW: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """``(coarse, fine)`` of floating-point images [B, C, H, W], whose sum is the image.

    fine = - sigma^2 / 2 * (Laplacian of Gaussian of width ``sigma`` pixels) * image. By the heat equation that is, to
    first order, what a blur of that width takes away, so that coarse is a blurred image, with no term left out: the two
    add up exactly. The border is mirrored about its outermost pixels.

    >>> coarse, fine = split_frequencies(torch.ones(1, 1, 8, 8), sigma=1.0)
    >>> bool(fine.abs().max() < 1e-6)
    True
    """
    kernels = gaussian_and_second_derivative(sigma, images_BCHW.device)
    smooth, curved = (kernel.to(images_BCHW.dtype) for kernel in kernels)
    laplacian = _separable(images_BCHW, curved, smooth) + _separable(images_BCHW, smooth, curved)
    fine = laplacian * (-(sigma**2) / 2)
    return images_BCHW - fine, fine


def gaussian_and_second_derivative(sigma: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Sampled kernels [2r + 1], float64, r = round(4 sigma): the first sums to 1, the second to exactly 0.

    Made on ``device`` (default: the CPU): a copy to a GPU would wait for all that it still has to do.
    """
    radius = max(1, round(TRUNCATE * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)
    smooth = torch.exp(-(x**2) / (2 * sigma**2))
    smooth = smooth / smooth.sum()
    curved = (x**2 / sigma**4 - 1 / sigma**2) * smooth
    # Sampled and cut off, it would see a curvature in a flat image.
    curved = curved - curved.sum() * smooth
    # ... and a wrong one in a parabola, whose second derivative is 2.
    return smooth, curved * (2 / (curved * x**2).sum())


def _separable(images_BCHW: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Convolution with ``rows`` down and ``columns`` across, both symmetric."""
    channels = images_BCHW.shape[1]
    x = images_BCHW
    for kernel, dim in ((rows, 2), (columns, 3)):
        shape = [channels, 1, 1, 1]
        shape[dim] = len(kernel)
        x = _mirrored(x, dim, len(kernel) // 2)
        view = [1, 1, 1, 1]
        view[dim] = len(kernel)
        x = F.conv2d(x, kernel.view(view).expand(shape).contiguous(), groups=channels)
    return x


def _mirrored(x: Tensor, dim: int, radius: int) -> Tensor:
    """Padded by reflection as often as it takes: torch's own refuses a radius of the size of the image."""
    size = x.shape[dim]
    index = torch.arange(-radius, size + radius, device=x.device)
    if size == 1:
        return x.index_select(dim, torch.zeros_like(index))
    period = 2 * (size - 1)
    index = index.remainder(period)
    return x.index_select(dim, torch.minimum(index, period - index))
