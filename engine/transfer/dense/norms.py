"""Norms of feature maps [B, D, h, w] have their parameters under torch's names ``weight`` and ``bias``.

Both norms compute in float32, whatever the dtype of the maps and of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = ("batch", "group")
GROUPS = 32


_alone = False


@contextmanager
def each_rank_alone() -> Iterator[None]:
    """Let `BatchNorm` take the statistics of this rank, for a pass that other ranks may not make."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def norm_of(kind: str) -> Callable[[int], nn.Module]:
    """Return the maker of a norm of so many channels. "batch": statistics over all ranks; "group": of each image."""
    assert kind in NORMS, kind
    return BatchNorm if kind == "batch" else GroupNorm


class GroupNorm(nn.GroupNorm):
    """The norm has at most 32 groups, of four channels at least: a map of one place needs more than one value."""

    def __init__(self, channels: int) -> None:
        most = max(1, min(GROUPS, channels // 4))
        groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
        super().__init__(groups, channels)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        y_BDhw = F.group_norm(x_BDhw.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y_BDhw.to(x_BDhw.dtype)


class BatchNorm(nn.Module):
    """Normalise over the images of all ranks, on any device: torch's SyncBatchNorm knows no CPU.

    In training it takes mean and variance of all ranks' micro-batches and keeps their running averages (momentum 0.1)
    for evaluation, in float32 buffers. All ranks must make the same passes.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        x, weight, bias = x_BDhw.float(), self.weight.float(), self.bias.float()
        if self.training and _ranks() > 1 and not _alone:
            y_BDhw = self._over_ranks(x, weight, bias)
        else:
            y_BDhw = F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
            )
        return y_BDhw.to(x_BDhw.dtype)

    def _over_ranks(self, x_BDhw: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
        # Each rank writes its mean and the sum of squares about it into its own row: one sum over ranks gathers all.
        count = x_BDhw.numel() // x_BDhw.shape[1]
        variance_D, mean_D = torch.var_mean(x_BDhw, dim=(0, 2, 3), unbiased=False)
        own = torch.cat([mean_D, variance_D * count, mean_D.new_full((1,), count)])
        before, after = torch.distributed.get_rank(), _ranks() - 1 - torch.distributed.get_rank()
        rows_R = _SumOverRanks.apply(F.pad(own[None], (0, 0, before, after)))
        means_RD, squares_RD, counts_R1 = rows_R.split((len(mean_D), len(mean_D), 1), dim=1)
        total = counts_R1.sum()
        mean_D = (means_RD * counts_R1).sum(0) / total
        squares_D = (squares_RD + counts_R1 * (means_RD - mean_D).square()).sum(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean_D, self.momentum)
            self.running_var.lerp_(squares_D / (total - 1), self.momentum)
        scale_D = weight_D * (squares_D / total + self.eps).rsqrt()
        return x_BDhw * scale_D[:, None, None] + (bias_D - mean_D * scale_D)[:, None, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply ``fn`` as any module does, but keep the running averages in float32 when the parameters are cast."""
        mean, variance = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = mean.to(self.running_mean.device), variance.to(self.running_var.device)
        return self


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, and sum the gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
