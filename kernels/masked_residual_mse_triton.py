"""Compute masked_residual_mse in Triton: kernels, launches, registered ops. Letters as in masked_residual_mse.py.

A program has one patch: it normalises the pixels once, then reads the predictions of every pair and writes their
gradient and the sum of squares. A second stage adds the sums of all programs in a fixed order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirl.kernels.launch import ceil_div, next_power_of_two, on_device_of
from mirl.kernels.masked_residual_mse_cpu import VARIANCE_EPS
from mirl.kernels.pixels import device_floats, image_geometry, load_pixels, patch_base, row_table
from mirl.kernels.registration import KernelOp, traced
from mirl.kernels.triton_import import tl, triton

_FINISH_BLOCK = 8192
_SCALE_BLOCK = 4096


@triton.jit
def _loss_kernel(
    main_ptrs, residual_ptrs, difference_ptrs, images_ptr, ids_ptr, scale_ptr, shift_ptr, unit_ptr, partial_ptr,
    rows, masked, grid_width, eps, image_stride_b, image_stride_h, image_stride_w, image_stride_c, stride_b, stride_r,
    PAIRS: tl.constexpr, RESIDUAL: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr, NORM_PIX: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, PIXEL_ROWS: tl.constexpr, NORMALISE: tl.constexpr,
    PIXELS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = P * P * C
    program, programs = tl.program_id(0), tl.num_programs(0)
    batch, row = (program // rows).to(tl.int64), program % rows
    offset = tl.arange(0, PIXELS)
    inside = offset < Q
    if FULL:  # rows are all N patches: find out whether this one is masked
        slot = tl.arange(0, MASKED)
        ids = tl.load(ids_ptr + batch * masked + slot, mask=slot < masked, other=-1)
        is_masked = tl.max((ids == row).to(tl.int32), axis=0) > 0
        patch = row.to(tl.int64)
        wanted = offset < tl.where(is_masked, Q, 0)  # Triton 3.9's interpreter cannot `&` a block with a scalar
    else:
        patch = tl.load(ids_ptr + batch * rows + row)
        wanted = inside
    source = batch * stride_b + row * stride_r + offset
    # The first pair's loads come before the reductions of the pixels, because those hold up whatever follows them.
    first = tl.load(main_ptrs[0] + source, mask=wanted, other=0.0)
    if RESIDUAL:
        first_residual = tl.load(residual_ptrs[0] + source, mask=wanted, other=0.0)
    base = patch_base(patch, batch, grid_width, image_stride_b, image_stride_h, image_stride_w, P)
    target = load_pixels(
        images_ptr, base, offset, wanted, scale_ptr, shift_ptr, image_stride_h, image_stride_w, image_stride_c,
        P, C, PIXEL_ROWS, NORMALISE,
    )  # fmt: skip
    target = tl.where(wanted, target, 0.0)
    if NORM_PIX:
        mean = tl.sum(target, axis=0) / Q
        target = tl.where(wanted, target - mean, 0.0)
        variance = tl.sum(target * target, axis=0) / (Q - 1)
        target = target / tl.sqrt(variance + eps)
    for pair in tl.static_range(PAIRS):
        if pair == 0:
            difference = first.to(tl.float32)
            if RESIDUAL:
                difference += first_residual.to(tl.float32)
        else:
            difference = tl.load(main_ptrs[pair] + source, mask=wanted, other=0.0).to(tl.float32)
            if RESIDUAL:
                difference += tl.load(residual_ptrs[pair] + source, mask=wanted, other=0.0).to(tl.float32)
        difference -= target
        tl.store(partial_ptr + pair * programs.to(tl.int64) + program, tl.sum(difference * difference, axis=0))
        if KEEP:  # the rows of visible patches get zeros
            kept = (difference * tl.load(unit_ptr + pair)).to(difference_ptrs[pair].dtype.element_ty)
            tl.store(difference_ptrs[pair] + program.to(tl.int64) * Q + offset, kept, mask=inside)


@triton.jit
def _finish_kernel(
    partial_ptr, weight_ptr, loss_ptr, terms_ptr, programs, count, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    loss = 0.0
    for pair in tl.static_range(PAIRS):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + pair * programs + index, mask=index < programs, other=0.0)
        term = tl.sum(total, axis=0) / count
        tl.store(terms_ptr + pair, term)
        loss += term * tl.load(weight_ptr + pair)
    tl.store(loss_ptr, loss)


@triton.jit
def _scale_kernel(
    in_ptrs, out_ptrs, grad_ptr, factor_ptr, count, PAIRS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    grad = tl.load(grad_ptr).to(tl.float32)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for pair in tl.static_range(PAIRS):
        factor = grad * tl.load(factor_ptr + pair)
        if not IN_PLACE or factor != 1.0:
            value = tl.load(in_ptrs[pair] + index, mask=index < count, other=0.0).to(tl.float32) * factor
            tl.store(out_ptrs[pair] + index, value.to(out_ptrs[pair].dtype.element_ty), mask=index < count)


def _units(dtype: torch.dtype, weights: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Return two factors a pair: one by which forward multiplies the difference, and one that is left to backward."""
    factors = [2 * weight / count for weight in weights]
    ones = [1.0] * len(factors)
    return (ones, factors) if dtype == torch.float16 else (factors, ones)


def _row_strided(predictions: list[Tensor]) -> list[Tensor]:
    """Return the predictions as they are if they can be read through one set of strides, else contiguous copies.

    They can if all have the same strides and pixels are neighbours, as in a slice without the class token.
    """
    strides = {prediction.stride() for prediction in predictions}
    if len(strides) == 1 and predictions[0].stride(-1) == 1:
        return predictions
    return [prediction.contiguous() for prediction in predictions]


def _masked_residual_mse(
    main: list[Tensor],
    residual: list[Tensor],
    images: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    layout: str,
    norm_pix: bool,
    weights: list[float],
    full: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return loss [], terms [G] (float32) and differences: G tensors shaped as main, or none if `keep` is False."""
    geometry = image_geometry(images, patch_size, layout)
    pairs, device = len(main), images.device
    predictions = _row_strided([*main, *residual])
    batch, rows, pixels = predictions[0].shape
    masked = ids_BM.shape[1]
    count = batch * masked * pixels
    differences = [torch.empty(predictions[0].shape, device=device, dtype=main[0].dtype) for _ in main] if keep else []
    partial_GR = torch.empty(pairs, batch * rows, device=device, dtype=torch.float32)
    loss, terms_G = (torch.empty(shape, device=device, dtype=torch.float32) for shape in ((), (pairs,)))
    units, _ = _units(main[0].dtype, weights, count)
    block = next_power_of_two(pixels)
    with on_device_of(images):
        _loss_kernel[(batch * rows,)](
            tuple(predictions[:pairs]), tuple(predictions[pairs:] or predictions[:pairs]),
            tuple(differences or predictions[:pairs]), images, ids_BM.contiguous(),
            row_table(scale, patch_size, device), row_table(shift, patch_size, device),
            device_floats(tuple(units), device), partial_GR, rows, masked, geometry.grid_width, VARIANCE_EPS,
            geometry.stride_b, geometry.stride_h, geometry.stride_w, geometry.stride_c,
            predictions[0].stride(0), predictions[0].stride(1),
            PAIRS=pairs, RESIDUAL=len(residual) > 0, FULL=full, KEEP=keep, NORM_PIX=norm_pix, P=patch_size,
            C=geometry.channels, PIXEL_ROWS=geometry.pixel_rows, NORMALISE=len(scale) > 0, PIXELS=block,
            MASKED=next_power_of_two(masked) if full else 1,
            # A patch of up to 1024 values gets one warp: its sums need no barrier, and twenty such programs fit a
            # multiprocessor.
            num_warps=max(1, min(8, block // 1024)),
        )  # fmt: skip
        _finish_kernel[(1,)](
            partial_GR, device_floats(tuple(weights), device), loss, terms_G, batch * rows, float(count),
            PAIRS=pairs, BLOCK=min(_FINISH_BLOCK, next_power_of_two(batch * rows)), num_warps=8,
        )  # fmt: skip
    return loss, terms_G, differences


def _fake(main, residual, images, ids, patch_size, scale, shift, layout, norm_pix, weights, full, keep):
    loss, terms = (images.new_empty(shape, dtype=torch.float32) for shape in ((), (len(main),)))
    return loss, terms, [prediction.new_empty(prediction.shape) for prediction in main] if keep else []


def _launch_scale(differences: list[Tensor], out: list[Tensor], grad: Tensor, factors: list[float]) -> None:
    count = differences[0].numel()
    with on_device_of(grad):
        _scale_kernel[(ceil_div(count, _SCALE_BLOCK),)](
            tuple(differences), tuple(out), grad, device_floats(tuple(factors), grad.device), count,
            PAIRS=len(differences), IN_PLACE=out is differences, BLOCK=_SCALE_BLOCK, num_warps=4,
        )  # fmt: skip


def _scale_differences(differences: list[Tensor], grad: Tensor, factors: list[float]) -> list[Tensor]:
    """Return differences[g] * grad * factors[g] as new tensors, because a traced graph must not write to saved ones."""
    out = [torch.empty_like(difference) for difference in differences]
    _launch_scale(differences, out, grad, factors)
    return out


scale_differences_op = KernelOp(
    _scale_differences, lambda differences, grad, factors: [d.new_empty(d.shape) for d in differences], direct=False
)


def _setup(ctx, inputs, output):
    main, residual, _, ids_BM, _, scale, shift, *_, weights, _, _ = inputs
    _, terms, differences = output
    ctx.mark_non_differentiable(terms, *differences)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the predictions, and nobody reads them
    ctx.residuals = len(residual)
    # These lists are empty for normalised images, and torch.library takes an empty list for a list of tensors.
    ctx.scale_shift = [None if values else [] for values in (scale, shift)]
    ctx.count = ids_BM.numel() * main[0].shape[-1]
    ctx.weights, ctx.dtype = weights, main[0].dtype
    ctx.save_for_backward(*differences)


def _backward(ctx, grad_loss, *_):
    differences = list(ctx.saved_tensors)
    _, factors = _units(ctx.dtype, ctx.weights, ctx.count)
    if traced(grad_loss):
        grads = scale_differences_op(differences, grad_loss, factors)
    else:
        grads = differences
        _launch_scale(differences, grads, grad_loss, factors)
        torch.autograd.graph.increment_version(differences)  # a second backward must fail, not scale twice
    return grads, grads[: ctx.residuals], None, None, None, *ctx.scale_shift, *[None] * 5


masked_residual_mse_op = KernelOp(_masked_residual_mse, _fake, setup_context=_setup, backward=_backward, direct=False)
