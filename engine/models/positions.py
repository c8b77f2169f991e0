"""Fixed 2-D sin-cos positions, in the convention of MAE: checkpoints of MAE and MIRL depend on its every detail."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Positions of a class token and of ``grid[0] * grid[1]`` patches in row-major order: [1 + N, width], float32.

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
    row_N = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_N = torch.arange(columns, dtype=torch.float64).repeat(rows)
    halves = []
    for position_N in (column_N, row_N):
        angle_NF = torch.outer(position_N, frequencies_F)
        halves += [angle_NF.sin(), angle_NF.cos()]
    patches_ND = torch.cat(halves, dim=1)
    return torch.cat([patches_ND.new_zeros(1, width), patches_ND]).float()
