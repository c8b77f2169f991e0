"""The reconstruction objective (Eq. 6, 7) says which decoders predict a target together, and computes their loss.

Shapes: B batch, N patches, M masked, Q pixels of a patch, G decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirl.engine.models.config import FREQUENCY, ModelConfig
from mirl.engine.models.masking import PatchMask
from mirl.engine.models.objectives.frequency import split_frequencies
from mirl.engine.models.objectives.perceptual import PerceptualLoss
from mirl.engine.models.pixels import (
    denormalise_patches,
    image_layout,
    normalise_images,
    normalise_patches,
    patchify,
    unpatchify,
)
from mirl.kernels import gather_tokens, masked_residual_mse, masked_residual_mse_full


class Term(NamedTuple):
    """A term is one mean squared error between a prediction and a target.

    The prediction is that of decoder ``main``, plus that of decoder ``residual`` if not None (both 1..G). The target is
    ``part`` of the image: "all", or one of the two of `split_frequencies`, "coarse" or "fine".
    """

    main: int
    residual: int | None
    weight: float
    part: str = "all"

    @property
    def name(self) -> str:
        """Return the name in logs: "pair_1_6" or "decoder_1"."""
        return f"decoder_{self.main}" if self.residual is None else f"pair_{self.main}_{self.residual}"


def objective_terms(config: ModelConfig) -> tuple[Term, ...]:
    """List the terms of an objective.

    mirl: pairs (g, G + 1 - g), weight 2 / G; multi_decoder: each alone, weight 1 / G; one decoder: it alone.
    coarse_to_fine: each alone, weight 1 / G, the shallow half on the coarse part, the deep half on the fine one;
    fine_to_coarse: the other way round.
    """
    count = config.segments
    if config.objective in FREQUENCY:
        shallow, deep = ("coarse", "fine") if config.objective == "coarse_to_fine" else ("fine", "coarse")
        return tuple(Term(g, None, 1 / count, shallow if g <= count // 2 else deep) for g in range(1, count + 1))
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
    """Return the weighted sum of the terms, a scalar, and the terms [len(terms)].

    Both are float32, or float64 for float64 predictions. Under ``norm_pix`` the patches of a part of the image are
    normalised by the statistics of that part.
    predictions: of decoders 1..G, [B, M, Q] if ``masked_only``, else [B, N, Q] of which only masked patches count.
    shared_gradient: one gradient tensor for both decoders of a pair, written in the forward pass; else plain autograd.
    """
    targets = part_images(config, images, predictions[0].dtype)
    losses, values = [], {}
    for part, target in targets.items():
        chosen = [term for term in terms if term.part == part]
        main = [predictions[term.main - 1] for term in chosen]
        residual = [predictions[term.residual - 1] for term in chosen if term.residual is not None]
        weights = [term.weight for term in chosen]
        if shared_gradient:
            layout = image_layout(target)
            mean, std = (config.mean, config.std) if layout == "BHWC" else (None, None)
            loss_of = masked_residual_mse if masked_only else masked_residual_mse_full
            loss, errors = loss_of(
                main, residual, target, mask.ids_masked, patch_size=config.patch_size, mean=mean, std=std,
                layout=layout, norm_pix=config.norm_pix, weights=weights,
            )  # fmt: skip
        else:
            loss, errors = _plain_loss(config, main, residual, weights, target, mask, masked_only)
        losses.append(loss)
        values |= dict(zip((term.name for term in chosen), errors, strict=True))
    if len(losses) == 1:
        return losses[0], errors
    return losses[0] + losses[1], torch.stack([values[term.name] for term in terms])


def part_images(config: ModelConfig, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the decoders' targets by `Term.part`: the images as they are, or their normalised parts [B, C, H, W]."""
    if config.objective not in FREQUENCY:
        return {"all": images}
    # Never in bfloat16: the fine part is a small difference of neighbouring pixels.
    precise = torch.promote_types(dtype, torch.float32)
    coarse, fine = split_frequencies(normalise_images(images, config.mean, config.std, precise), config.log_sigma)
    return {"coarse": coarse, "fine": fine}


def feature_loss(terms: Sequence[Term], features: Sequence[Tensor], target_BND: Tensor, mask: PatchMask) -> Tensor:
    """Return the terms' weighted sum of mean squared errors of predicted features, a float32 scalar.

    The features of a pair's two decoders add up, as their pixels do.
    target_BND: the teacher's features. features: those of decoders 1..G, [B, M, D], or [B, N, D] of which only masked
    patches count.
    """
    target_BMD = gather_tokens(target_BND, mask.ids_masked)
    target_BMD = target_BMD.to(torch.promote_types(target_BMD.dtype, torch.float32))
    masked_only = features[0].shape[1] == target_BMD.shape[1]
    total = target_BMD.new_zeros(())
    for term in terms:
        predicted = features[term.main - 1].to(target_BMD.dtype)
        if term.residual is not None:
            predicted = predicted + features[term.residual - 1].to(target_BMD.dtype)
        predicted_BMD = predicted if masked_only else gather_tokens(predicted, mask.ids_masked)
        total = total + term.weight * (predicted_BMD - target_BMD).square().mean()
    return total


def perceptual_loss(
    config: ModelConfig,
    terms: Sequence[Term],
    predictions: Sequence[Tensor],
    images: Tensor,
    mask: PatchMask,
    loss: PerceptualLoss,
) -> Tensor:
    """Return the terms' weighted sum of ``loss`` between each image and its prediction, a float32 scalar.

    The prediction is the image with its masked patches replaced. Predictions of normalised patches are put back with
    the true statistics.
    """
    pixels = normalise_images(images, config.mean, config.std, torch.float32)
    true_BNQ = patchify(pixels, config.patch_size)
    wanted = loss.targets(pixels)
    total = pixels.new_zeros(())
    for term in terms:
        predicted = predictions[term.main - 1].float()
        if term.residual is not None:
            predicted = predicted + predictions[term.residual - 1].float()
        if predicted.shape[1] != true_BNQ.shape[1]:
            visible_BKQ = gather_tokens(true_BNQ, mask.ids_keep)  # any value would do: only masked patches are shown
            rows = torch.cat([visible_BKQ, predicted], dim=1)
            predicted = gather_tokens(rows, mask.ids_restore)
        if config.norm_pix:
            predicted = denormalise_patches(predicted, true_BNQ)
        shown_BNQ = torch.where(mask.mask_BN[..., None], predicted, true_BNQ)
        total = total + term.weight * loss(unpatchify(shown_BNQ, config.grid, config.patch_size), wanted)
    return total


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
