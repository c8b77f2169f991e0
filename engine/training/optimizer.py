"""The optimiser and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mirl.engine.configuration.config import OptimConfig
from mirl.engine.distributed.muon import MuonAdamW


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


def is_matrix_of_block(name: str, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a matrix inside of a block of an encoder or a decoder, which is what Muon steps.

    Projections from pixels, to pixels and between encoder and decoders are left to AdamW, as Muon's authors advise for
    the first and the last layer.
    """
    return parameter.ndim == 2 and "blocks" in name.split(".")


def with_matrices_apart(groups: list[dict], model: nn.Module) -> list[dict]:
    """``groups`` with the matrices of each in a group of its own, "muon" True, and all else as it was."""
    matrices = {id(parameter) for name, parameter in model.named_parameters() if is_matrix_of_block(name, parameter)}
    made = []
    for group in groups:
        apart = [parameter for parameter in group["params"] if id(parameter) in matrices]
        rest = [parameter for parameter in group["params"] if id(parameter) not in matrices]
        made += [group | {"params": apart, "muon": True}, group | {"params": rest}]
    return [group for group in made if group["params"]]


def assert_covered_once(parameters: Iterable[nn.Parameter], groups: list[dict]) -> None:
    """Assert that each trainable one of ``parameters`` is in exactly one of ``groups``, and that nothing else is."""
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    expected = [id(parameter) for parameter in parameters if parameter.requires_grad]
    assert len(covered) == len(set(covered)) and set(covered) == set(expected)


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, groups: list[dict] | None = None
) -> torch.optim.AdamW:
    """AdamW of torch: compiles nothing at start, unlike DeepSpeed's own. One fused kernel where torch has one.

    Where ``config.optimizer`` is "muon", that of the matrices of blocks is Muon (`mirl.engine.distributed.muon`).

    groups: parameter groups of ``model`` with their weight decay; None: those of `parameter_groups`.
    """
    groups = parameter_groups(model, config.weight_decay) if groups is None else groups
    settings = {
        "lr": config.peak_lr, "betas": config.betas, "eps": 1e-8, "fused": device.type in ("cuda", "cpu")
    }  # fmt: skip
    if config.optimizer == "muon":
        return MuonAdamW(with_matrices_apart(groups, model), **settings)
    return torch.optim.AdamW(groups, **settings)
