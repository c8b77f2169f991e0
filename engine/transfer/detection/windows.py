"""Attention in windows sees the tokens of an image as several shorter sequences, by a plain reshape.

Shapes: B batch, h w grid of patches, V side of a window in patches, M = h / V * w / V windows of an image, D width.
"""

from __future__ import annotations

from torch import Tensor


def split_windows(x_BND: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Split [B, h * w, D] into [B * M, V * V, D], the windows of an image one after another. V must divide h and w."""
    (rows, columns), width = grid, x_BND.shape[-1]
    x = x_BND.view(-1, rows // side, side, columns // side, side, width)
    return x.transpose(2, 3).reshape(-1, side * side, width)


def join_windows(x_MVD: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Invert `split_windows`."""
    (rows, columns), width = grid, x_MVD.shape[-1]
    x = x_MVD.view(-1, rows // side, columns // side, side, side, width)
    return x.transpose(2, 3).reshape(-1, rows * columns, width)


def global_blocks(depth: int) -> tuple[int, ...]:
    """Number, from 0, the blocks that attend globally among windowed ones: the last of each quarter, as in ViTDet.

    >>> global_blocks(12), global_blocks(54)
    ((2, 5, 8, 11), (12, 26, 39, 53))
    """
    return tuple(sorted({max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))
