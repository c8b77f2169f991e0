"""Fine-tune shortly in one process on images that fit into memory; a report or an experiment does so many times.

Letters: n images, B of a batch, H W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.engine.analysis.forecast import Advance, ignore
from mirl.engine.configuration.config import OptimConfig
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.schedule import Schedule
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.layer_decay import layer_decay_groups


@dataclass(frozen=True, kw_only=True)
class ShortFinetune:
    """The recipe counts optimiser steps: AdamW, a tenth of warm-up, half a cosine; shifts and flips for augmentation.

    shift: largest translation in pixels, either way, in each direction; the border is repeated.
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float = 1.0
    shift: int = 2
    flip: bool = True


def finetune_in_memory(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    recipe: ShortFinetune,
    *,
    seed: int,
    advance: Advance = ignore,
) -> None:
    """Train ``model`` in place, as a function of ``seed``.

    images: uint8 [n, H, W, C] or normalised float [n, C, H, W]; labels: int64 [n]; both on the model's device. advance:
    is told of each step.
    """
    device = images.device
    optim = OptimConfig(steps=recipe.steps, lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    groups = layer_decay_groups(model, weight_decay=recipe.weight_decay, decay=recipe.layer_decay)
    optimizer = build_optimizer(model, optim, device, groups)
    schedule = Schedule(
        peak_lr=recipe.lr, min_lr=0.0, warmup_steps=recipe.steps // 10, total_steps=recipe.steps, shape="cosine"
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # stochastic depth
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        rows, order = order[: recipe.batch_size].to(device), order[recipe.batch_size :]
        batch = shift_and_flip(images[rows], recipe.shift, recipe.flip, generator)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step) * group["lr_scale"]
        with autocast(device):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        advance(1)


@torch.no_grad()
def accuracy_percent(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Measure the top-1 in per cent of ``model`` on images as `finetune_in_memory` takes them."""
    model.eval()
    correct = 0
    for first in range(0, len(images), batch_size):
        with autocast(images.device):
            logits = model(images[first : first + batch_size])
        correct += int((logits.argmax(dim=1) == labels[first : first + batch_size]).sum())
    return 100 * correct / len(images)


def autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast on a GPU; float32 on a CPU, where narrow models gain nothing from bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def shift_and_flip(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Move each image by up to ``shift`` pixels and mirror it at even odds.

    images: uint8 [B, H, W, C] or float [B, C, H, W].
    """
    images_BHWC = images if images.dtype == torch.uint8 else images.permute(0, 2, 3, 1)
    batch, height, width, _ = images_BHWC.shape
    offsets_B2 = torch.randint(-shift, shift + 1, (batch, 2), generator=generator)
    mirrored_B = torch.rand(batch, generator=generator) < (0.5 if flip else 0.0)
    rows_BH = (torch.arange(height) + offsets_B2[:, :1]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) + offsets_B2[:, 1:]).clamp(0, width - 1)
    columns_BW = torch.where(mirrored_B[:, None], columns_BW.flip(1), columns_BW)
    device = images.device
    batch_B11 = torch.arange(batch, device=device)[:, None, None]
    moved_BHWC = images_BHWC[batch_B11, rows_BH.to(device)[:, :, None], columns_BW.to(device)[:, None, :]]
    return moved_BHWC if images.dtype == torch.uint8 else moved_BHWC.permute(0, 3, 1, 2)
