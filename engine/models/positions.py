"""Fixed 2-D sin-cos positions, in the convention of MAE: checkpoints of MAE and MIRL depend on its every detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.errors import UserError


def sincos_positions(grid: tuple[int, int], width: int, source_grid: tuple[int, int] | None = None) -> Tensor:
    """Positions of a class token and of ``grid[0] * grid[1]`` patches in row-major order: [1 + N, width], float32.

    source_grid: the patches of ``grid`` lie where those of this grid would, stretched over the same area, so that
    centres of patches fall on each other as in a resized image; None: ``grid`` itself.

    Row 0 belongs to the class token and is zeros. In the other rows the first half of the features encodes the column,
    the second half the row; each half is sin, then cos, of position / 10000^(4i / width). Float64 until the last step.

    >>> sincos_positions((1, 2), 4)
    tensor([[0.0000, 0.0000, 0.0000, 0.0000],
            [0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0000, 1.0000]])
    """
    assert width % 4 == 0, f"width {width} is not a multiple of 4"
    rows, columns = grid
    quarter = width // 4
    frequencies_F = 1 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    source_rows, source_columns = source_grid or grid
    row_N = _places(rows, source_rows).repeat_interleave(columns)
    column_N = _places(columns, source_columns).repeat(rows)
    halves = []
    for position_N in (column_N, row_N):
        angle_NF = torch.outer(position_N, frequencies_F)
        halves += [angle_NF.sin(), angle_NF.cos()]
    patches_ND = torch.cat(halves, dim=1)
    return torch.cat([patches_ND.new_zeros(1, width), patches_ND]).float()


def _places(count: int, source: int) -> Tensor:
    """Centres of ``count`` patches in the numbering of ``source`` ones over the same length."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (source / count) - 0.5


def resample_positions(table_ND: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """A table of ``source_grid`` (rows, columns) for the patches of ``target_grid``: [1 + N, D] -> [1 + N', D].

    Bicubic, with antialiasing where the grid gets smaller, in float32, as timm's ``resample_abs_pos_embed``; row 0, the
    class token's, is kept. The same grid gives the same table. A leading axis of 1, which timm's tables have, is kept.
    UserError if the table is not of ``source_grid``.
    """
    rows, columns = source_grid
    if table_ND.ndim not in (2, 3) or table_ND.shape[:-1] not in ((1 + rows * columns,), (1, 1 + rows * columns)):
        raise UserError(
            f"positions have shape {list(table_ND.shape)} and their grid is {rows}x{columns}: give "
            f"[{1 + rows * columns}, width], or the grid that they were made for"
        )
    if tuple(source_grid) == tuple(target_grid):
        return table_ND
    class_row, patches = table_ND.split((1, rows * columns), dim=-2)
    image_1DHW = patches.reshape(1, rows, columns, -1).permute(0, 3, 1, 2).float()
    image_1DHW = F.interpolate(image_1DHW, size=tuple(target_grid), mode="bicubic", antialias=True)
    patches = image_1DHW.permute(0, 2, 3, 1).reshape(*table_ND.shape[:-2], -1, table_ND.shape[-1])
    return torch.cat([class_row, patches.to(table_ND.dtype)], dim=-2)
