"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mirl.engine.configuration.config import OptimConfig


def takes_weight_decay(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a matrix: two or more dimensions larger than one, so not a token [1, 1, D] or [1, D]."""
    return sum(size > 1 for size in parameter.shape) > 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; biases, norms and tokens without.

    Every trainable parameter is in exactly one group.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if takes_weight_decay(parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    assert_covered_once(model.parameters(), groups)
    return [group for group in groups if group["params"]]


def assert_covered_once(parameters: Iterable[nn.Parameter], groups: list[dict]) -> None:
    """Assert that each trainable one of ``parameters`` is in exactly one of ``groups``, and that nothing else is."""
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    expected = [id(parameter) for parameter in parameters if parameter.requires_grad]
    assert len(covered) == len(set(covered)) and set(covered) == set(expected)


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, groups: list[dict] | None = None
) -> torch.optim.AdamW:
    """AdamW of torch: compiles nothing at start, unlike DeepSpeed's own. One fused kernel where torch has one.

    groups: parameter groups of ``model`` with their weight decay; None: those of `parameter_groups`.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay) if groups is None else groups,
        lr=config.peak_lr,
        betas=config.betas,
        eps=1e-8,
        fused=device.type in ("cuda", "cpu"),
    )
