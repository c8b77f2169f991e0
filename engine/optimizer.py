"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; biases, norms and tokens without.

    A matrix is a parameter with two or more dimensions larger than one, so that tokens [1, 1, D] and [1, D] are none.
    Every trainable parameter is in exactly one group.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if sum(size > 1 for size in parameter.shape) > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    expected = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(covered) == len(set(covered)) and set(covered) == set(expected)
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW of torch: compiles nothing at start, unlike DeepSpeed's own. One fused kernel where torch has one."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.peak_lr,
        betas=config.betas,
        eps=1e-8,
        fused=device.type in ("cuda", "cpu"),
    )
