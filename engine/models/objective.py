"""The reconstruction objective (Eq. 6, 7): which decoders predict what together, and the loss of it.

Shapes: B batch, N patches, M masked, Q pixels of a patch, G decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.masking import PatchMask
from engine.models.pixels import image_layout, normalise_images, normalise_patches, patchify
from kernels import gather_tokens, masked_residual_mse, masked_residual_mse_full


class Term(NamedTuple):
    """One mean squared error: of decoder ``main``'s prediction, plus that of ``residual`` if not None (both 1..G)."""

    main: int
    residual: int | None
    weight: float

    @property
    def name(self) -> str:
        """As logs call it: "pair_1_6" or "decoder_1"."""
        return f"decoder_{self.main}" if self.residual is None else f"pair_{self.main}_{self.residual}"


def objective_terms(config: ModelConfig) -> tuple[Term, ...]:
    """mirl: pairs (g, G + 1 - g), weight 2 / G; multi_decoder: each alone, weight 1 / G; one decoder: it alone."""
    count = config.segments
    if config.objective == "multi_decoder" or count == 1:
        return tuple(Term(g, None, 1 / count) for g in range(1, count + 1))
    return tuple(Term(g, count + 1 - g, 2 / count) for g in range(1, count // 2 + 1))


def reconstruction_loss(
    config: ModelConfig,
    terms: Sequence[Term],
    predictions: Sequence[Tensor],
    images: Tensor,
    mask: PatchMask,
    *,
    masked_only: bool,
    shared_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the terms, and the terms: a scalar and [len(terms)], float32 (float64 for float64 predictions).

    predictions: of decoders 1..G, [B, M, Q] if ``masked_only``, else [B, N, Q] of which only masked patches count.
    shared_gradient: one gradient tensor for both decoders of a pair, written in the forward pass; else plain autograd.
    """
    main = [predictions[term.main - 1] for term in terms]
    residual = [predictions[term.residual - 1] for term in terms if term.residual is not None]
    weights = [term.weight for term in terms]
    if not shared_gradient:
        return _plain_loss(config, main, residual, weights, images, mask, masked_only)
    layout = image_layout(images)
    mean, std = (config.mean, config.std) if layout == "BHWC" else (None, None)
    loss = masked_residual_mse if masked_only else masked_residual_mse_full
    return loss(
        main, residual, images, mask.ids_masked, patch_size=config.patch_size, mean=mean, std=std, layout=layout,
        norm_pix=config.norm_pix, weights=weights,
    )  # fmt: skip


def _plain_loss(
    config: ModelConfig,
    main: Sequence[Tensor],
    residual: Sequence[Tensor],
    weights: Sequence[float],
    images: Tensor,
    mask: PatchMask,
    masked_only: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(main[0].dtype, torch.float32)
    target_BNQ = patchify(normalise_images(images, config.mean, config.std, dtype), config.patch_size)
    target_BMQ = gather_tokens(normalise_patches(target_BNQ) if config.norm_pix else target_BNQ, mask.ids_masked)
    errors = []
    for index, prediction in enumerate(main):
        total = prediction.to(dtype) + residual[index].to(dtype) if residual else prediction.to(dtype)
        total_BMQ = total if masked_only else gather_tokens(total, mask.ids_masked)
        errors.append((target_BMQ - total_BMQ).square().mean())
    terms = torch.stack(errors)
    return (terms * terms.new_tensor(weights)).sum(), terms.detach()
