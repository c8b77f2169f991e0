"""Add the partial sums of the programs in a fixed order: the second stage of a deterministic reduction.

Letters: A arrays reduced at once, R rows of partial sums (one a program), D columns.
"""

import torch
from torch import Tensor

from mirl.kernels.launch import ceil_div, on_device_of
from mirl.kernels.registration import wrap_triton
from mirl.kernels.triton_import import tl, triton

_ROWS, _COLUMNS = 128, 32


@triton.jit
def _column_sum_kernel(partial_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    array = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        offset = (array * rows + row[:, None]) * columns + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + array * columns + column, value, mask=column < columns)


def column_sum(partial_ARD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum [A, R, D] float32 over R -> [A, D] in `dtype`, the same bits in every run."""
    arrays, rows, columns = partial_ARD.shape
    out_AD = torch.empty(arrays, columns, device=partial_ARD.device, dtype=dtype)
    with on_device_of(partial_ARD):
        wrap_triton(_column_sum_kernel)[(ceil_div(columns, _COLUMNS), arrays)](
            partial_ARD, out_AD, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
    return out_AD
