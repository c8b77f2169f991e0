"""Compute masked_residual_mse in plain torch: the reference, and the path of CPU tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.kernels.pixels import gather_patch_pixels, normalise_pixels

VARIANCE_EPS = 1e-6


def patch_target(
    images: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    layout: str,
    norm_pix: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the target t [B, M, Q] in `dtype` (float32 or float64).

    (t - mean) / sqrt(var + eps) with var unbiased is a LayerNorm with eps and gain corrected by (Q - 1) / Q.
    """
    pixels_BMPX = gather_patch_pixels(images, ids_BM, patch_size, layout)
    target_BMQ = normalise_pixels(pixels_BMPX, scale, shift, patch_size, dtype).flatten(2)
    if not norm_pix:
        return target_BMQ
    pixels = target_BMQ.shape[-1]
    shrink = (pixels - 1) / pixels
    gain_Q = target_BMQ.new_full((pixels,), math.sqrt(shrink))
    return F.layer_norm(target_BMQ, (pixels,), gain_Q, eps=VARIANCE_EPS * shrink)


class SharedGradient(torch.autograd.Function):
    """Map (target, weights, *main, *residual) to (loss, terms, *differences).

    A pair's difference, times a factor, is the gradient of its main and of its residual prediction. It stays in the
    target's dtype (float32 or float64) until backward scales and rounds it once.
    """

    @staticmethod
    def forward(target_BMQ: Tensor, weights: tuple[float, ...], *predictions: Tensor) -> tuple[Tensor, ...]:
        pairs = len(weights)
        terms, differences = [], []
        for pair in range(pairs):
            difference = predictions[pair].to(target_BMQ.dtype) - target_BMQ
            if len(predictions) > pairs:
                difference += predictions[pairs + pair]
            flat = difference.view(-1)
            terms.append(torch.dot(flat, flat) / flat.numel())
            differences.append(difference)
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        return loss, torch.stack(terms), *differences

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weights, *predictions = inputs
        _, terms, *differences = output
        ctx.mark_non_differentiable(terms, *differences)
        ctx.weights, ctx.dtype, ctx.residuals = weights, predictions[0].dtype, len(predictions) - len(weights)
        ctx.save_for_backward(*differences)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = [
            (difference * (grad_loss * (2 * weight / difference.numel()))).to(ctx.dtype)
            for weight, difference in zip(ctx.weights, ctx.saved_tensors, strict=True)
        ]
        return None, None, *grads, *grads[: ctx.residuals]
