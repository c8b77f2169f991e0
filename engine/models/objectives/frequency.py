"""The objectives coarse_to_fine and fine_to_coarse hand out the two frequency parts of an image (Table 2e)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TRUNCATE = 4.0  # the filter ends at this many sigma


def split_frequencies(images_BCHW: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Split floating-point images [B, C, H, W] into ``(coarse, fine)``, whose sum is the image.

    fine = - sigma^2 / 2 * (Laplacian of Gaussian of width ``sigma`` pixels) * image. By the heat equation fine is, to
    first order, the part that a blur of this width takes away, so coarse is a blurred image. No term is left out: the
    two add up exactly. The border is mirrored about its outermost pixels.

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
    """Sample two kernels [2r + 1], float64, r = round(4 sigma): the first sums to 1, the second to exactly 0.

    They are made on ``device`` (default: the CPU), because a copy to a GPU would wait for all its pending work.
    """
    radius = max(1, round(TRUNCATE * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)
    smooth = torch.exp(-(x**2) / (2 * sigma**2))
    smooth = smooth / smooth.sum()
    curved = (x**2 / sigma**4 - 1 / sigma**2) * smooth
    # The sampled, cut-off kernel would see a curvature in a flat image.
    curved = curved - curved.sum() * smooth
    # It would also see a wrong curvature in a parabola, whose second derivative is 2.
    return smooth, curved * (2 / (curved * x**2).sum())


def _separable(images_BCHW: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Convolve with ``rows`` down and ``columns`` across, both symmetric."""
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
    """Pad by reflection as often as it takes: torch's own padding refuses a radius of the size of the image."""
    size = x.shape[dim]
    index = torch.arange(-radius, size + radius, device=x.device)
    if size == 1:
        return x.index_select(dim, torch.zeros_like(index))
    period = 2 * (size - 1)
    index = index.remainder(period)
    return x.index_select(dim, torch.minimum(index, period - index))
