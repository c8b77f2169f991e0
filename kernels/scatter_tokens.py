"""Make the decoder's input: put encoder tokens at their places, the mask token elsewhere, and add positions (Eq. 2).

Letters: B batch, N patches, K visible ones, E decoder width; row 0 is the class token. R = 1 + N rows a sample.

Bytes at least, forward: (1+K) rows read, 1+N written a sample; backward: 1+N read, 1+K written. B = 256, 224 px, E =
512, bfloat16: 65 MB each way. The backward reads the gradient once: a program keeps its rows and walks over samples,
writes the rows of visible patches to their slots and adds up those of masked patches in registers. A second stage sums
the programs' results.
"""

import torch
from torch import Tensor

from mirl.kernels.checks import check_device, check_float, check_ids, check_restore, check_shape
from mirl.kernels.column_sum import column_sum
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import (
    TILE_WARPS,
    ceil_div,
    column_block,
    multiprocessors,
    on_device_of,
    row_block,
    rows_contiguous,
)
from mirl.kernels.registration import KernelOp
from mirl.kernels.triton_import import tl, triton


def scatter_tokens_reference(x_B1KE: Tensor, ids_restore_BN: Tensor, fill: Tensor, pos_1NE: Tensor | None) -> Tensor:
    """Make one table of tokens and fill rows and select from it: on a CPU four times as fast as torch.where or scatter.

    The table is in float32 at least, because index_select's backward adds up the fill gradient in the table's dtype.
    """
    batch, rows, width = x_B1KE.shape
    compute = torch.promote_types(x_B1KE.dtype, torch.float32)
    batch_B1 = torch.arange(batch, device=x_B1KE.device)[:, None]
    if fill.dim() == 1:  # a copy a sample: the gradient is summed over M, then over B, not over B * M in one chain
        fill_rows, fill_row_BN = fill.expand(batch, width), batch_B1
    else:
        fill_rows, fill_row_BN = fill, torch.arange(fill.shape[0], device=x_B1KE.device)[None, :]
    table = torch.cat([x_B1KE.reshape(batch * rows, width).to(compute), fill_rows.to(compute)])
    visible_BN = ids_restore_BN < rows - 1
    source_BN = torch.where(visible_BN, batch_B1 * rows + 1 + ids_restore_BN, batch * rows + fill_row_BN)
    source_B1N = torch.cat([batch_B1 * rows, source_BN], dim=1)
    out = table.index_select(0, source_B1N.flatten()).view(batch, -1, width)
    return (out if pos_1NE is None else out + pos_1NE).to(x_B1KE.dtype)


@triton.jit
def _scatter_kernel(
    x_ptr, restore_ptr, fill_ptr, pos_ptr, out_ptr, rows, kept, patches, stride_b, stride_k, stride_fill, E,
    HAS_POS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = (row // (1 + patches)).to(tl.int64)
    patch = row % (1 + patches) - 1  # -1: the class token
    slot = tl.load(restore_ptr + batch * patches + patch, mask=(row < rows) & (patch >= 0), other=-1)
    inside = (row[:, None] < rows) & (column[None, :] < E)
    visible = slot[:, None] < kept  # the class token too: slot -1 is row 0 of x
    source = (batch * stride_b + (1 + slot) * stride_k)[:, None] + column[None, :]
    x = tl.load(x_ptr + source, mask=inside & visible, other=0.0).to(tl.float32)
    fill_offset = patch[:, None] * stride_fill + column[None, :]
    fill = tl.load(fill_ptr + fill_offset, mask=inside & (visible == 0), other=0.0).to(tl.float32)
    value = tl.where(visible, x, fill)
    if HAS_POS:
        pos_offset = (1 + patch[:, None]) * E + column[None, :]
        value += tl.load(pos_ptr + pos_offset, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * E + column[None, :]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scatter_backward_kernel(
    grad_ptr, restore_ptr, grad_x_ptr, partial_ptr, batches, kept, patches, groups, stride_b, stride_r, E,
    PER_PATCH: tl.constexpr, FILL_GRAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    row = tile * ROWS + tl.arange(0, ROWS)  # 0: the class token, 1 + n: patch n
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < 1 + patches) & (column[None, :] < E)
    fill_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    # The rows of the next sample are on their way to shared memory while those of one are written.
    for sample in tl.range(group, batches, groups, num_stages=2):
        batch = tl.zeros((ROWS,), dtype=tl.int64) + sample
        is_patch = (row >= 1) & (row <= patches)
        slot = tl.load(restore_ptr + batch * patches + row - 1, mask=is_patch, other=-1)
        source = (batch * stride_b + row * stride_r)[:, None] + column[None, :]
        grad = tl.load(grad_ptr + source, mask=inside, other=0.0)
        visible = slot[:, None] < kept
        target = (batch * (1 + kept) + 1 + slot)[:, None] * E + column[None, :]
        tl.store(grad_x_ptr + target, grad, mask=inside & visible)
        if FILL_GRAD:
            fill_sum += tl.where(visible, 0.0, grad.to(tl.float32))
    if FILL_GRAD:
        if PER_PATCH:  # partial [groups, N, E]
            out = (group.to(tl.int64) * patches + row - 1)[:, None] * E + column[None, :]
            tl.store(partial_ptr + out, fill_sum, mask=inside & (row[:, None] >= 1))
        else:  # partial [programs, E]
            out = tl.program_id(0).to(tl.int64) * E + column
            tl.store(partial_ptr + out, tl.sum(fill_sum, axis=0), mask=column < E)


def _scatter_tokens(x_B1KE: Tensor, ids_restore_BN: Tensor, fill: Tensor, pos_1NE: Tensor | None) -> Tensor:
    x_B1KE, fill = rows_contiguous(x_B1KE), rows_contiguous(fill)
    (batch, patches), (_, x_rows, width) = ids_restore_BN.shape, x_B1KE.shape
    out_B1NE = torch.empty(batch, 1 + patches, width, device=x_B1KE.device, dtype=x_B1KE.dtype)
    columns = column_block(width)
    tile_rows, rows = row_block(columns), batch * (1 + patches)
    with on_device_of(x_B1KE):
        _scatter_kernel[(ceil_div(rows, tile_rows), ceil_div(width, columns))](
            x_B1KE, ids_restore_BN.contiguous(), fill, fill if pos_1NE is None else pos_1NE.contiguous(), out_B1NE,
            rows, x_rows - 1, patches, x_B1KE.stride(0), x_B1KE.stride(1), fill.stride(0) if fill.dim() == 2 else 0,
            width, HAS_POS=pos_1NE is not None, ROWS=tile_rows, COLUMNS=columns, num_warps=TILE_WARPS,
        )  # fmt: skip
    return out_B1NE


def _scatter_tokens_backward(
    grad_B1NE: Tensor, ids_restore_BN: Tensor, kept: int, per_patch: bool, fill_dtype: torch.dtype, fill_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return grad_x [B, 1+K, E] and grad_fill [E] or [N, E] (empty if `fill_grad` is False)."""
    grad_B1NE = rows_contiguous(grad_B1NE)
    batch, rows, width = grad_B1NE.shape
    columns = column_block(width)
    tile_rows = row_block(columns)
    tiles, column_tiles = ceil_div(rows, tile_rows), ceil_div(width, columns)
    # Six programs fit a multiprocessor (80 registers a thread): all are resident at once, and none waits for a slot.
    groups = max(1, min(batch, 6 * multiprocessors(grad_B1NE.device) // (tiles * column_tiles)))
    grad_x_B1KE = grad_B1NE.new_empty(batch, 1 + kept, width)
    partial_shape = (1, groups, (rows - 1) * width) if per_patch else (1, tiles * groups, width)
    partial = grad_B1NE.new_empty(partial_shape if fill_grad else (1, 0, 0), dtype=torch.float32)
    with on_device_of(grad_B1NE):
        _scatter_backward_kernel[(tiles * groups, column_tiles)](
            grad_B1NE, ids_restore_BN.contiguous(), grad_x_B1KE, partial, batch, kept, rows - 1, groups,
            grad_B1NE.stride(0), grad_B1NE.stride(1), width,
            PER_PATCH=per_patch, FILL_GRAD=fill_grad, ROWS=tile_rows, COLUMNS=columns, num_warps=TILE_WARPS,
        )  # fmt: skip
    if not fill_grad:
        return grad_x_B1KE, partial.new_empty(0, dtype=fill_dtype)
    grad_fill = column_sum(partial, fill_dtype)[0]
    return grad_x_B1KE, grad_fill.view(-1, width) if per_patch else grad_fill


def _scatter_backward_fake(grad, restore, kept, per_patch, fill_dtype, fill_grad):
    fill_shape = (0,) if not fill_grad else (grad.shape[1] - 1, grad.shape[2]) if per_patch else (grad.shape[2],)
    return grad.new_empty(grad.shape[0], 1 + kept, grad.shape[2]), grad.new_empty(fill_shape, dtype=fill_dtype)


scatter_tokens_backward_op = KernelOp(_scatter_tokens_backward, _scatter_backward_fake)


def _setup(ctx, inputs, output):
    x_B1KE, ids_restore_BN, fill, pos_1NE = inputs
    ctx.kept, ctx.per_patch, ctx.fill_dtype = x_B1KE.shape[1] - 1, fill.dim() == 2, fill.dtype
    ctx.pos_dtype = None if pos_1NE is None else pos_1NE.dtype
    ctx.save_for_backward(ids_restore_BN)


def _backward(ctx, grad_B1NE):
    grad_x, grad_fill = scatter_tokens_backward_op(
        grad_B1NE, ctx.saved_tensors[0], ctx.kept, ctx.per_patch, ctx.fill_dtype, ctx.needs_input_grad[2]
    )
    grad_pos = grad_B1NE.sum(0, dtype=torch.float32).to(ctx.pos_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, grad_fill if ctx.needs_input_grad[2] else None, grad_pos


scatter_tokens_op = KernelOp(
    _scatter_tokens,
    lambda x, restore, fill, pos: x.new_empty(restore.shape[0], 1 + restore.shape[1], x.shape[2]),
    setup_context=_setup,
    backward=_backward,
)


def scatter_tokens(
    x_B1KE: Tensor, ids_keep_BK: Tensor, ids_restore_BN: Tensor, fill: Tensor, pos_1NE: Tensor | None = None
) -> Tensor:
    """Return the decoder's input [B, 1+N, E] in the dtype of x: tokens at their places, the fill elsewhere, positions.

    Row 0 = x[0]; row 1+n = x[1+k] if patch n is the k-th visible one, else the fill; pos is added to every row. The
    sum is formed in float32 at least and rounded once.

    ids_keep_BK     int64 numbers of the visible patches; only the checks read them
    ids_restore_BN  int64; [b, n] is the row of patch n in concat(visible, masked), so below K means visible
    fill            the mask token [E], or a row for each patch [N, E] (a table, say after a projection)
    pos_1NE         positions [1+N, E] or None

    Differentiable in x, fill and, if it requires a gradient, pos. The gradient of fill is summed in float32 in a fixed
    order.
    Example: x = [[[1], [2]]], ids_keep = [[1]], ids_restore = [[1, 0]], fill = [9] gives [[[1], [9], [2]]].
    Raises: ValueError for wrong shapes, dtypes, devices; with set_debug(True) for ids out of range, repeated, at odds.
    """
    check_float("x_B1KE", x_B1KE)
    check_shape("x_B1KE", x_B1KE, (None, None, None), "[B, 1+K, E]")
    batch, rows, width = x_B1KE.shape
    check_shape("ids_keep_BK", ids_keep_BK, (batch, rows - 1), "[B, K]")
    check_shape("ids_restore_BN", ids_restore_BN, (batch, None), "[B, N]")
    patches = ids_restore_BN.shape[1]
    if fill.dim() == 1:
        check_shape("fill", fill, (width,), "[E]")
    else:
        check_shape("fill", fill, (patches, width), "[N, E]")
    if pos_1NE is not None:
        check_shape("pos_1NE", pos_1NE, (1 + patches, width), "[1+N, E]")
    check_ids("ids_keep_BK", ids_keep_BK, patches)
    check_ids("ids_restore_BN", ids_restore_BN, patches)
    check_restore(ids_keep_BK, ids_restore_BN)
    check_device(x_B1KE, ids_keep_BK=ids_keep_BK, ids_restore_BN=ids_restore_BN, fill=fill, pos_1NE=pos_1NE)
    scatter = scatter_tokens_op if uses_triton(x_B1KE) else scatter_tokens_reference
    return scatter(x_B1KE, ids_restore_BN, fill, pos_1NE)
