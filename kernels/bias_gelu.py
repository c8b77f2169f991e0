"""Compute erf-GELU with the bias of the Linear before it, and again in the backward: only the input is kept.

Letters: R rows (all leading axes), F features. gelu(u) = u * Phi(u), u = x + bias; dgelu = Phi(u) + u * phi(u).
Phi is a polynomial times the exponential of the density phi (`_normal`).

Bytes at least, 16-bit: forward 2 * 2RF (x, out), backward 3 * 2RF (x, gradient, dx). The bias gradient is summed by
persistent programs, one partial row each, and a second stage in a fixed order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.kernels.checks import check_device, check_float, check_shape
from mirl.kernels.column_sum import column_sum
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import (
    TILE_ELEMENTS,
    TILE_WARPS,
    ceil_div,
    column_block,
    multiprocessors,
    on_device_of,
    row_block,
)
from mirl.kernels.registration import KernelOp, wrap_triton
from mirl.kernels.triton_import import tl, triton


def bias_gelu_reference(x: Tensor, bias_F: Tensor | None) -> Tensor:
    """Add the bias in float32 at least, and do not round the sum before the GELU."""
    if bias_F is None:
        return F.gelu(x)
    return F.gelu(x + bias_F.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


@triton.jit
def _normal(u):
    """Return Phi(u) and exp(-u^2 / 2) of float32 blocks. Phi is right to 2e-7; far out it is 0 and 1, at 0 it is 0.5.

    Phi(-a) = exp(-a^2 / 2) * R(1 / (1 + 0.39 a)), a >= 0, is the form of Abramowitz and Stegun 7.1.26. The polynomial R
    is a fit of our own to 1.2e-8; its terms cancel less than theirs, so that float32 keeps more of it. libdevice's erf
    computes both of its two branches and shares nothing with the derivative, which needs this exponential too.
    """
    weight = tl.exp2(-0.7213475204444817 * u * u)  # log2(e) / 2
    w = 1.0 + 0.39 * tl.abs(u)
    root = tl.rsqrt(w)
    t = root * root
    t = t * (2.0 - w * t)  # 1 / w after a step of Newton's; a division takes four instructions more
    series = 0.05369845777750015 * t - 0.257659375667572
    series = series * t + 0.37425675988197327
    series = series * t - 0.01593073271214962
    series = series * t + 0.194166898727417
    series = series * t + 0.15146797895431519
    tail = series * t * weight
    return tl.where(u < 0, tail, 1.0 - tail), weight


@triton.jit
def _gelu_kernel(
    x_ptr, bias_ptr, out_ptr, rows, features, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < features)
    offset = row[:, None] * features + column[None, :]
    u = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
    cdf, _ = _normal(u)
    tl.store(out_ptr + offset, (u * cdf).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward_kernel(
    x_ptr, bias_ptr, grad_ptr, grad_x_ptr, partial_ptr, rows, tiles, features,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < features, other=0.0).to(tl.float32)
    for tile in range(program, tiles, programs):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row[:, None] < rows) & (column[None, :] < features)
        offset = row[:, None] * features + column[None, :]
        u = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += bias[None, :]
        cdf, weight = _normal(u)
        grad_x = grad * (cdf + 0.3989422804014327 * u * weight)  # 1 / sqrt(2 pi)
        if HAS_BIAS:
            bias_sum += grad_x
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        out = program.to(tl.int64) * features + column
        tl.store(partial_ptr + out, tl.sum(bias_sum, axis=0), mask=column < features)


def _tile(features: int, elements: int = TILE_ELEMENTS) -> dict[str, int]:
    columns = min(256, column_block(features))
    return {"ROWS": row_block(columns, elements), "COLUMNS": columns, "num_warps": TILE_WARPS}


def _bias_gelu(x: Tensor, bias_F: Tensor | None) -> Tensor:
    x = x.contiguous()
    features = x.shape[-1]
    rows, tile = x.numel() // features, _tile(features)
    out = torch.empty_like(x)
    with on_device_of(x):
        wrap_triton(_gelu_kernel)[(ceil_div(rows, tile["ROWS"]), ceil_div(features, tile["COLUMNS"]))](
            x, x if bias_F is None else bias_F.contiguous(), out, rows, features, HAS_BIAS=bias_F is not None, **tile
        )
    return out


def _bias_gelu_backward(x: Tensor, bias_F: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_x (shaped as x) and grad_bias [F] (empty without a bias)."""
    x, grad = x.contiguous(), grad.contiguous()
    features = x.shape[-1]
    rows, tile = x.numel() // features, _tile(features, TILE_ELEMENTS // 2)  # the backward keeps more in registers
    tiles, column_tiles = ceil_div(rows, tile["ROWS"]), ceil_div(features, tile["COLUMNS"])
    # Without a bias there is nothing to add up, so each tile has a program. With one there are as many programs as are
    # resident at once.
    programs = tiles if bias_F is None else max(1, min(tiles, 8 * multiprocessors(x.device) // column_tiles))
    grad_x = torch.empty_like(x)
    partial_1PF = torch.empty(1, 0 if bias_F is None else programs, features, device=x.device, dtype=torch.float32)
    with on_device_of(x):
        wrap_triton(_gelu_backward_kernel)[(programs, column_tiles)](
            x, x if bias_F is None else bias_F.contiguous(), grad, grad_x, partial_1PF, rows, tiles, features,
            HAS_BIAS=bias_F is not None, **tile,
        )  # fmt: skip
    return grad_x, x.new_empty(0) if bias_F is None else column_sum(partial_1PF, bias_F.dtype)[0]


bias_gelu_backward_op = KernelOp(
    _bias_gelu_backward,
    lambda x, bias, grad: (x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)),
    inline=True,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias_F = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward_op(x, bias_F, grad)
    return grad_x, None if bias_F is None else grad_bias


bias_gelu_op = KernelOp(
    _bias_gelu, lambda x, bias: x.new_empty(x.shape), setup_context=_setup, backward=_backward, inline=True
)


def bias_gelu(x: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Compute gelu(x + bias) with the erf GELU, in the dtype of x; any leading axes. Differentiable in both.

    Example: gelu(0) = 0, gelu(1) = 0.8413447.
    Raises: ValueError for wrong shapes, dtypes, devices.
    """
    check_float("x", x)
    if bias_F is not None:
        check_shape("bias_F", bias_F, (x.shape[-1],), "[F]")
    check_device(x, bias_F=bias_F)
    return (bias_gelu_op if uses_triton(x) else bias_gelu_reference)(x, bias_F)
