"""Residual add and the LayerNorm after it in one pass: total = x + delta, normed = LN(total).

Letters: R rows (all leading axes), D width. Statistics are float32 and those of the rounded total, as when add and
norm are two operations.

Bytes at least, 16-bit tokens: forward 4 * 2RD (x, delta, total, normed), backward 4 * 2RD (total, both gradients,
dx); dx is the gradient of x and of delta, written once. Backward programs are persistent: each walks over many tiles
of rows, keeps its share of the weight and bias gradients in registers and writes it once, so the partial sums (2
programs a multiprocessor) stay under a twentieth of the tokens' bytes; a second stage adds them in a fixed order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.kernels.checks import check_device, check_float, check_shape
from mirl.kernels.column_sum import column_sum
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import ceil_div, multiprocessors, next_power_of_two, on_device_of, row_block
from mirl.kernels.registration import KernelOp, wrap_triton
from mirl.kernels.triton_import import tl, triton


def residual_layer_norm_reference(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x if delta is None else x + delta
    compute = torch.promote_types(total.dtype, weight_D.dtype)
    normed = F.layer_norm(total.to(compute), weight_D.shape, weight_D.to(compute), bias_D.to(compute), eps)
    return total, normed.to(x.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, mean_ptr, rstd_ptr, rows, D, eps,
    HAS_DELTA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < D)
    offset = row[:, None] * D + column[None, :]
    total = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        total += tl.load(delta_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, rounded, mask=mask)
        total = rounded.to(tl.float32)
    mean = tl.sum(total, axis=1) / D
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    total_ptr, mean_ptr, rstd_ptr, weight_ptr, grad_normed_ptr, grad_total_ptr, grad_x_ptr, partial_ptr, rows, tiles, D,
    HAS_GRAD_TOTAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(program, tiles, programs):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row[:, None] < rows) & (column[None, :] < D)
        offset = row[:, None] * D + column[None, :]
        # All loads before the first use: the reductions below hold up everything that comes after them.
        total = tl.load(total_ptr + offset, mask=mask, other=0.0)
        grad = tl.load(grad_normed_ptr + offset, mask=mask, other=0.0)
        if HAS_GRAD_TOTAL:
            passed = tl.load(grad_total_ptr + offset, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad = grad.to(tl.float32)
        unit = tl.where(mask, (total.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += grad * unit
        bias_sum += grad
        scaled = grad * weight[None, :]
        along_unit = tl.sum(scaled * unit, axis=1) / D
        along_one = tl.sum(scaled, axis=1) / D
        grad_x = (scaled - along_one[:, None] - unit * along_unit[:, None]) * rstd[:, None]
        if HAS_GRAD_TOTAL:
            grad_x += passed.to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    out = program.to(tl.int64) * D + column
    tl.store(partial_ptr + out, tl.sum(weight_sum, axis=0), mask=column < D)
    tl.store(partial_ptr + programs.to(tl.int64) * D + out, tl.sum(bias_sum, axis=0), mask=column < D)


def _tile(width: int) -> dict[str, int]:
    columns = next_power_of_two(width)
    return {"ROWS": row_block(columns), "COLUMNS": columns}


def _residual_layer_norm(
    x: Tensor, delta: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> total, normed (shaped as x), mean [R], rstd [R] (float32)."""
    return _launch_forward(x.contiguous(), delta.contiguous(), weight_D, bias_D, eps)


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> normed (shaped as x), mean [R], rstd [R] (float32)."""
    return _launch_forward(x.contiguous(), None, weight_D, bias_D, eps)[1:]


def _launch_forward(x, delta, weight_D, bias_D, eps):
    width = x.shape[-1]
    rows = x.numel() // width
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    mean_R, rstd_R = (torch.empty(rows, device=x.device, dtype=torch.float32) for _ in range(2))
    tile = _tile(width)
    with on_device_of(x):
        wrap_triton(_forward_kernel)[(ceil_div(rows, tile["ROWS"]),)](
            x, x if delta is None else delta, weight_D.contiguous(), bias_D.contiguous(), total, normed, mean_R, rstd_R,
            rows, width, eps, HAS_DELTA=delta is not None, num_warps=4, **tile,
        )  # fmt: skip
    return total, normed, mean_R, rstd_R


def _residual_layer_norm_backward(
    total: Tensor, mean_R: Tensor, rstd_R: Tensor, weight_D: Tensor, grad_normed: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> grad_x (shaped as total), gradients of weight and bias [2, D]."""
    total, grad_normed = total.contiguous(), grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    width, rows = total.shape[-1], mean_R.numel()
    tile = _tile(width)
    tiles = ceil_div(rows, tile["ROWS"])
    programs = min(tiles, 2 * multiprocessors(total.device))
    grad_x = torch.empty_like(total)
    partial_2PD = torch.empty(2, programs, width, device=total.device, dtype=torch.float32)
    with on_device_of(total):
        wrap_triton(_backward_kernel)[(programs,)](
            total, mean_R, rstd_R, weight_D.contiguous(), grad_normed, total if grad_total is None else grad_total,
            grad_x, partial_2PD, rows, tiles, width, HAS_GRAD_TOTAL=grad_total is not None, num_warps=8, **tile,
        )  # fmt: skip
    return grad_x, column_sum(partial_2PD, weight_D.dtype)


residual_layer_norm_backward_op = KernelOp(
    _residual_layer_norm_backward,
    lambda total, mean, rstd, weight, grad_normed, grad_total: (
        total.new_empty(total.shape),
        weight.new_empty(2, weight.shape[0]),
    ),
    inline=True,
)


def _input_gradients(ctx, grad_total, grad_normed):
    """-> grad_x (also of delta), grad_weight, grad_bias; an output nobody used costs nothing."""
    if grad_normed is None:
        return grad_total, None, None
    total, mean_R, rstd_R, weight_D = ctx.saved_tensors
    grad_x, grads_2D = residual_layer_norm_backward_op(total, mean_R, rstd_R, weight_D, grad_normed, grad_total)
    return grad_x, grads_2D[0], grads_2D[1]


def _residual_setup(ctx, inputs, output):
    total, _, mean_R, rstd_R = output
    ctx.mark_non_differentiable(mean_R, rstd_R)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, mean_R, rstd_R, inputs[2])


def _residual_backward(ctx, grad_total, grad_normed, *_):
    grad_x, grad_weight, grad_bias = _input_gradients(ctx, grad_total, grad_normed)
    return grad_x, grad_x, grad_weight, grad_bias, None


def _norm_setup(ctx, inputs, output):
    _, mean_R, rstd_R = output
    ctx.mark_non_differentiable(mean_R, rstd_R)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], mean_R, rstd_R, inputs[1])


def _norm_backward(ctx, grad_normed, *_):
    return *_input_gradients(ctx, None, grad_normed), None


def _row_statistics(x):
    return tuple(x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))


residual_layer_norm_op = KernelOp(
    _residual_layer_norm,
    lambda x, delta, weight, bias, eps: (x.new_empty(x.shape), x.new_empty(x.shape), *_row_statistics(x)),
    setup_context=_residual_setup,
    backward=_residual_backward,
    inline=True,
)
layer_norm_op = KernelOp(
    _layer_norm,
    lambda x, weight, bias, eps: (x.new_empty(x.shape), *_row_statistics(x)),
    setup_context=_norm_setup,
    backward=_norm_backward,
    inline=True,
)


def residual_layer_norm(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(total, normed) = (x + delta, LayerNorm(x + delta)), both in the dtype of x; any leading axes, any width D.

    `delta` None: total is x itself and only the norm is computed. The weight and bias may have another dtype (float32
    parameters with 16-bit tokens). Differentiable in everything.
    Example: x = [1, 3], delta = [1, 1], weight 1, bias 0: total = [2, 4], normed = [-1, 1].
    Raises: ValueError for wrong shapes, dtypes, devices.
    """
    check_float("x", x)
    width = x.shape[-1]
    if delta is not None:
        check_shape("delta", delta, tuple(x.shape), "the shape of x")
        if delta.dtype != x.dtype:
            raise ValueError(f"delta has dtype {delta.dtype}, x {x.dtype}; cast one of them")
    check_shape("weight_D", weight_D, (width,), "[D]")
    check_shape("bias_D", bias_D, (width,), "[D]")
    check_device(x, delta=delta, weight_D=weight_D, bias_D=bias_D)
    if not uses_triton(x):
        return residual_layer_norm_reference(x, delta, weight_D, bias_D, eps)
    if delta is None:
        return x, layer_norm_op(x, weight_D, bias_D, eps)[0]
    total, normed, _, _ = residual_layer_norm_op(x, delta, weight_D, bias_D, eps)
    return total, normed
