"""Compute the mean squared error of main + residual predictions on masked patches, all pairs in one pass (Eq. 6, 7).

Letters: B batch, C channels, P patch side, N patches, M masked ones, Q = P*P*C pixels of a patch, G pairs.

    t = pixels of the patch, or (t - mean) / sqrt(var + 1e-6) over its Q pixels, var unbiased (norm_pix)
    L_g = mean over B, M, Q of (main_g + residual_g - t)^2          loss = sum_g weight_g * L_g

main_g and residual_g have the same gradient, 2 weight_g / (B M Q) * (main_g + residual_g - t). It is one tensor a pair,
written in the forward pass and handed to both. The backward pass multiplies it in place by the incoming gradient, and
moves no byte if the incoming gradient is 1. In float16 the gradient (order 1e-8) would vanish before the loss scale
comes in. So there the difference itself is stored, and the backward pass applies all factors at once.

Bytes at least, 16-bit predictions, uint8 images: G pairs * 3 * 2BMQ + BMQ, B = 256, 224 px, three pairs: 549 MB.
The result is deterministic: a program writes the sum of its own patch, and a second stage adds these in a fixed order.

The plain-torch form is in masked_residual_mse_cpu.py, the Triton form in masked_residual_mse_triton.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirl.kernels.checks import check_device, check_float, check_ids, check_shape
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.gather_tokens import gather_tokens_reference
from mirl.kernels.masked_residual_mse_cpu import SharedGradient, patch_target
from mirl.kernels.masked_residual_mse_triton import masked_residual_mse_op
from mirl.kernels.pixels import ImageGeometry, image_geometry, pixel_scale_shift


def _check(
    main: Sequence[Tensor],
    residual: Sequence[Tensor],
    images: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    layout: str,
    norm_pix: bool,
    weights: Sequence[float] | None,
    full: bool,
) -> ImageGeometry:
    if not main:
        raise ValueError("main is empty; at least one prediction is needed")
    if residual and len(residual) != len(main):
        raise ValueError(f"residual has {len(residual)} predictions, main {len(main)}; give as many, or none")
    if weights is not None and len(weights) != len(main):
        raise ValueError(f"weights has {len(weights)} values for {len(main)} pairs; give one each")
    geometry = image_geometry(images, patch_size, layout)
    check_shape("ids_masked_BM", ids_BM, (geometry.batch, None), "[B, M]")
    check_ids("ids_masked_BM", ids_BM, geometry.patches)
    if ids_BM.numel() == 0:
        raise ValueError("ids_masked_BM is empty; a mean over no patch is undefined: raise the mask ratio")
    pixels = patch_size * patch_size * geometry.channels
    if norm_pix and pixels < 2:
        raise ValueError("norm_pix needs patches of at least 2 values; this patch has 1: set norm_pix=False")
    check_device(images, ids_masked_BM=ids_BM)
    shape = (geometry.batch, geometry.patches if full else ids_BM.shape[1], pixels)
    names = [f"main[{i}]" for i in range(len(main))] + [f"residual[{i}]" for i in range(len(residual))]
    for name, prediction in zip(names, [*main, *residual], strict=True):
        check_float(name, prediction)
        check_shape(name, prediction, shape, "[B, N, Q]" if full else "[B, M, Q]")
        check_device(images, **{name: prediction})
        if prediction.dtype != main[0].dtype:
            raise ValueError(f"{name} has dtype {prediction.dtype}, main[0] {main[0].dtype}; cast one of them")
    return geometry


def _loss(main, residual, images, ids_BM, patch_size, mean, std, layout, norm_pix, weights, full):
    geometry = _check(main, residual, images, ids_BM, patch_size, layout, norm_pix, weights, full)
    weights = [float(w) for w in weights] if weights is not None else [1 / len(main)] * len(main)
    scale, shift = pixel_scale_shift(images, mean, std, geometry.channels)
    main, residual = list(main), list(residual)
    if uses_triton(main[0]):
        keep = torch.is_grad_enabled() and any(prediction.requires_grad for prediction in (*main, *residual))
        loss, terms_G, _ = masked_residual_mse_op(
            main, residual, images, ids_BM, patch_size, scale, shift, layout, norm_pix, weights, full, keep
        )
        return loss, terms_G
    if full:
        main, residual = ([gather_tokens_reference(p_BNQ, ids_BM) for p_BNQ in group] for group in (main, residual))
    compute = torch.promote_types(main[0].dtype, torch.float32)
    with torch.no_grad():
        target_BMQ = patch_target(images, ids_BM, patch_size, scale, shift, layout, norm_pix, compute)
    loss, terms_G, *_ = SharedGradient.apply(target_BMQ, tuple(weights), *main, *residual)
    return loss, terms_G


def masked_residual_mse(
    main: Sequence[Tensor],
    residual: Sequence[Tensor],
    images: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "BHWC",
    norm_pix: bool = True,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss [], terms [G]) in float32 (float64 for float64 predictions): loss = sum_g weights[g] * terms[g].

    main, residual  G predictions each, of the masked patches, [B, M, Q]; residual may be empty (MAE, multi-decoder)
    images          uint8 0..255 with mean and std, or float taken as normalised; [B, H, W, C] or, with layout="BCHW",
                    [B, C, H, W]; any strides
    ids_masked_BM   int64 numbers of the masked patches; entry m belongs to prediction row m
    weights         lambda_g; default 1 / G each (the paper's 2 / G over G / 2 pairs)

    Only the loss is differentiable; the terms are for logging. On a GPU a second backward through the same graph raises
    autograd's RuntimeError, because the first one scales the stored gradient in place.
    Example: one 1-pixel patch, raw target 3, main 1, residual 4: loss (1 + 4 - 3)^2 = 4, both gradients 2 * 2 = 4.
    Raises: ValueError for wrong shapes, dtypes, devices, numbers of predictions; no masked patch.
    """
    return _loss(main, residual, images, ids_masked_BM, patch_size, mean, std, layout, norm_pix, weights, full=False)


def masked_residual_mse_full(
    main: Sequence[Tensor],
    residual: Sequence[Tensor],
    images: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "BHWC",
    norm_pix: bool = True,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute masked_residual_mse of predictions of every patch, [B, N, Q]; those of visible patches get gradient 0."""
    return _loss(main, residual, images, ids_masked_BM, patch_size, mean, std, layout, norm_pix, weights, full=True)
