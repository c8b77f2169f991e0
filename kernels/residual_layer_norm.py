"""Add the residual and take the LayerNorm after it in one pass: total = x + delta, normed = LN(total).

delta may come without the bias of the Linear that made it: total = x + (delta + bias). The backward pass writes the
gradient of delta and sums it to the gradient of the bias on the way. The Linear's own backward pass would read all of
it once more for that sum.

Letters: R rows (all leading axes), D width. Statistics are float32. They are taken of the rounded total, as when add
and norm are two operations.

Bytes at least, 16-bit tokens: forward 4 * 2RD (x, delta, total, normed), backward 4 * 2RD (total, both gradients,
dx); dx is the gradient of x and of delta, written once. Backward programs are persistent: each walks over many tiles
of rows, keeps its share of the weight and bias gradients in registers and writes it once. So the partial sums (2
programs a multiprocessor) stay under a twentieth of the tokens' bytes. A second stage adds them in a fixed order. The
next tile is on its way to shared memory while one is reduced.
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
    x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, delta_bias_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round delta + bias to the dtype of delta, as the Linear would give it."""
    if delta is not None and delta_bias_D is not None:
        delta = (delta + delta_bias_D.to(torch.promote_types(delta.dtype, torch.float32))).to(delta.dtype)
    total = x if delta is None else x + delta
    compute = torch.promote_types(total.dtype, weight_D.dtype)
    normed = F.layer_norm(total.to(compute), weight_D.shape, weight_D.to(compute), bias_D.to(compute), eps)
    return total, normed.to(x.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, delta_ptr, delta_bias_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, mean_ptr, rstd_ptr, rows, D, eps,
    HAS_DELTA: tl.constexpr, HAS_DELTA_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < D)
    offset = row[:, None] * D + column[None, :]
    total = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_DELTA_BIAS:
            delta += tl.load(delta_bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        total += delta
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
    HAS_GRAD_TOTAL: tl.constexpr, SUM_GRAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    grad_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row[:, None] < rows) & (column[None, :] < D)
        offset = row[:, None] * D + column[None, :]
        # All loads come before the first use, because the reductions below hold up everything after them.
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
        if SUM_GRAD:
            grad_sum += grad_x
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    out = program.to(tl.int64) * D + column
    tl.store(partial_ptr + out, tl.sum(weight_sum, axis=0), mask=column < D)
    tl.store(partial_ptr + programs.to(tl.int64) * D + out, tl.sum(bias_sum, axis=0), mask=column < D)
    if SUM_GRAD:
        tl.store(partial_ptr + 2 * programs.to(tl.int64) * D + out, tl.sum(grad_sum, axis=0), mask=column < D)


def _tile(width: int) -> dict[str, int]:
    columns = next_power_of_two(width)
    return {"ROWS": row_block(columns), "COLUMNS": columns}


def _residual_layer_norm(
    x: Tensor, delta: Tensor, delta_bias_D: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total, normed (shaped as x), mean [R] and rstd [R] (float32)."""
    return _launch_forward(x.contiguous(), delta.contiguous(), delta_bias_D, weight_D, bias_D, eps)


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed (shaped as x), mean [R] and rstd [R] (float32)."""
    return _launch_forward(x.contiguous(), None, None, weight_D, bias_D, eps)[1:]


def _launch_forward(x, delta, delta_bias_D, weight_D, bias_D, eps):
    width = x.shape[-1]
    rows = x.numel() // width
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    mean_R, rstd_R = (torch.empty(rows, device=x.device, dtype=torch.float32) for _ in range(2))
    tile = _tile(width)
    with on_device_of(x):
        wrap_triton(_forward_kernel)[(ceil_div(rows, tile["ROWS"]),)](
            x, x if delta is None else delta, weight_D if delta_bias_D is None else delta_bias_D.contiguous(),
            weight_D.contiguous(), bias_D.contiguous(), total, normed, mean_R, rstd_R, rows, width, eps,
            HAS_DELTA=delta is not None, HAS_DELTA_BIAS=delta_bias_D is not None, num_warps=4, **tile,
        )  # fmt: skip
    return total, normed, mean_R, rstd_R


def _residual_layer_norm_backward(
    total: Tensor, mean_R: Tensor, rstd_R: Tensor, weight_D: Tensor, grad_normed: Tensor, grad_total: Tensor | None,
    sum_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return grad_x (shaped as total) and [2, D], the gradients of weight and bias.

    With `sum_grad` it is [3, D]: the last row is the sum of grad_x.
    """
    total, grad_normed = total.contiguous(), grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    width, rows = total.shape[-1], mean_R.numel()
    tile = _tile(width)
    tiles = ceil_div(rows, tile["ROWS"])
    programs = min(tiles, 2 * multiprocessors(total.device))
    grad_x = torch.empty_like(total)
    partial_APD = torch.empty(3 if sum_grad else 2, programs, width, device=total.device, dtype=torch.float32)
    with on_device_of(total):
        wrap_triton(_backward_kernel)[(programs,)](
            total, mean_R, rstd_R, weight_D.contiguous(), grad_normed, total if grad_total is None else grad_total,
            grad_x, partial_APD, rows, tiles, width, HAS_GRAD_TOTAL=grad_total is not None, SUM_GRAD=sum_grad,
            STAGES=2, num_warps=8, **tile,
        )  # fmt: skip
    return grad_x, column_sum(partial_APD, weight_D.dtype)


residual_layer_norm_backward_op = KernelOp(
    _residual_layer_norm_backward,
    lambda total, mean, rstd, weight, grad_normed, grad_total, sum_grad: (
        total.new_empty(total.shape),
        weight.new_empty(3 if sum_grad else 2, weight.shape[0]),
    ),
    inline=True,
)


def _input_gradients(ctx, grad_total, grad_normed, sum_grad=False):
    """Return grad_x (also of delta), grad_weight, grad_bias, sum of grad_x. An unused output costs nothing."""
    if grad_normed is None:
        return grad_total, None, None, grad_total.flatten(0, -2).sum(0, dtype=torch.float32) if sum_grad else None
    total, mean_R, rstd_R, weight_D = ctx.saved_tensors
    grad_x, grads_AD = residual_layer_norm_backward_op(
        total, mean_R, rstd_R, weight_D, grad_normed, grad_total, sum_grad
    )
    return grad_x, grads_AD[0], grads_AD[1], grads_AD[2] if sum_grad else None


def _residual_setup(ctx, inputs, output):
    total, _, mean_R, rstd_R = output
    ctx.mark_non_differentiable(mean_R, rstd_R)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(total, mean_R, rstd_R, inputs[3])


def _residual_backward(ctx, grad_total, grad_normed, *_):
    asked = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
    grad_x, grad_weight, grad_bias, grad_sum = _input_gradients(ctx, grad_total, grad_normed, asked)
    return grad_x, grad_x, grad_sum.to(ctx.bias_dtype) if asked else None, grad_weight, grad_bias, None


def _norm_setup(ctx, inputs, output):
    _, mean_R, rstd_R = output
    ctx.mark_non_differentiable(mean_R, rstd_R)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], mean_R, rstd_R, inputs[1])


def _norm_backward(ctx, grad_normed, *_):
    return *_input_gradients(ctx, None, grad_normed)[:3], None


class _NormPassingOn(torch.autograd.Function):
    """Map (x, weight, bias, eps) to x and LN(x). Both gradients of x arrive here, and the norm's kernel adds them."""

    @staticmethod
    def forward(ctx, x, weight_D, bias_D, eps):
        normed, mean_R, rstd_R = layer_norm_op(x, weight_D, bias_D, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean_R, rstd_R, weight_D)
        return x, normed

    @staticmethod
    def backward(ctx, grad_x, grad_normed):
        return *_input_gradients(ctx, grad_x, grad_normed)[:3], None


def _row_statistics(x):
    return tuple(x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))


residual_layer_norm_op = KernelOp(
    _residual_layer_norm,
    lambda x, delta, delta_bias, weight, bias, eps: (x.new_empty(x.shape), x.new_empty(x.shape), *_row_statistics(x)),
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
    x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-6,
    delta_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (x + delta, LayerNorm(x + delta)), both in the dtype of x; any leading axes, any width D.

    If `delta` is None, total is x itself and only the norm is computed. `delta_bias_D` is added to delta in place of
    the Linear that made delta. The weight and the biases may have another dtype (float32 parameters with 16-bit
    tokens). Differentiable in everything.
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
    if delta_bias_D is not None:
        check_shape("delta_bias_D", delta_bias_D, (width,), "[D]")
        if delta is None:
            raise ValueError("delta_bias_D is added to delta, and delta is None: give both")
    check_device(x, delta=delta, weight_D=weight_D, bias_D=bias_D, delta_bias_D=delta_bias_D)
    if not uses_triton(x):
        return residual_layer_norm_reference(x, delta, weight_D, bias_D, eps, delta_bias_D)
    if delta is None:
        if torch.compiler.is_compiling():  # no operator may return its argument
            return x, layer_norm_op(x, weight_D, bias_D, eps)[0]
        return _NormPassingOn.apply(x, weight_D, bias_D, eps)
    total, normed, _, _ = residual_layer_norm_op(x, delta, delta_bias_D, weight_D, bias_D, eps)
    return total, normed
