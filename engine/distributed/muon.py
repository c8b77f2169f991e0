"""Muon for the matrices of the blocks, AdamW for the rest, on whole parameters or on a rank's share of flat ones.

Muon (Jordan et al., 2024) keeps one moment, and makes each update of a matrix nearly orthogonal before it is applied.
The rule for the learning rate is Moonlight's (Liu et al., 2025, arXiv:2502.16982, section 2.2): an update of an A x B
matrix is scaled by 0.2 sqrt(max(A, B)), the root mean square that AdamW's updates have, so that a recipe's learning
rate and weight decay serve both. What is computed for one matrix is what `torch.optim.Muon` with
adjust_lr_fn="match_rms_adamw" computes.

ZeRO 1 and 2 give each rank consecutive elements of all matrices of a group laid end to end. Momentum is a matter of
single elements, so each rank keeps that of its share. A matrix that lies across the border of two shares is sent, as an
update, from each of its ranks to the others, and each computes it whole: a rank has two such matrices at most, besides
those that are larger than a share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirl.kernels.newton_schulz import orthogonalise

MOMENTUM = 0.95
RMS = 0.2
# Values of the matrices that are made orthogonal at a time. They need about five times their bytes meanwhile.
TOGETHER = 2**22
TOGETHER_ON_GPU = 2**25


@dataclass(frozen=True)
class Matrix:
    """A matrix of ``rows`` x ``columns`` whose first element is number ``first`` of its group's flat elements."""

    rows: int
    columns: int
    first: int = 0

    @property
    def last(self) -> int:
        return self.first + self.rows * self.columns

    def rate(self, lr: float) -> float:
        """The learning rate of an orthogonal update, for AdamW's ``lr``."""
        return lr * RMS * math.sqrt(max(self.rows, self.columns))


@dataclass(frozen=True)
class Share:
    """Elements ``first:last`` of a group's flat elements, owned by ``rank``; each rank owns as many."""

    first: int
    last: int
    rank: int
    process_group: Any = None

    def part_of(self, matrix: Matrix) -> slice:
        """The elements of ``matrix`` that lie here, counted from the beginning of the share."""
        return slice(max(matrix.first, self.first) - self.first, min(matrix.last, self.last) - self.first)

    def within(self, matrix: Matrix) -> slice:
        """The elements of ``matrix`` that lie here, counted from the beginning of the matrix."""
        return slice(max(matrix.first, self.first) - matrix.first, min(matrix.last, self.last) - matrix.first)

    def holds(self, matrix: Matrix) -> bool:
        """Whether all of ``matrix`` lies here."""
        return self.first <= matrix.first and matrix.last <= self.last

    def touches(self, matrix: Matrix) -> bool:
        """Whether any of ``matrix`` lies here."""
        return matrix.first < self.last and self.first < matrix.last

    def of(self, rank: int) -> Share:
        """The share of another rank."""
        size = self.last - self.first
        return Share(rank * size, (rank + 1) * size, rank, self.process_group)

    def others(self, matrix: Matrix) -> list[Share]:
        """The other shares that have a part of ``matrix``."""
        size = self.last - self.first
        ranks = range(matrix.first // size, (matrix.last - 1) // size + 1)
        return [self.of(rank) for rank in ranks if rank != self.rank]


class MuonAdamW(torch.optim.AdamW):
    """AdamW of torch that steps the groups with "muon" by Muon; state "exp_avg" of those is the momentum.

    A parameter of such a group is a matrix, or a flat share of several once `lay_out` has said of which.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        super().__init__(list(groups), **settings)
        self._layouts: dict[nn.Parameter, tuple[Share, list[Matrix]]] = {}
        for group in groups:
            if group.get("muon") and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("Muon steps matrices: give other parameters to a group without it")

    def lay_out(self, flat: nn.Parameter, share: Share, matrices: Sequence[Matrix]) -> None:
        """Say that ``flat`` [N] is ``share`` of ``matrices``, the whole group's in the order of their elements."""
        self._layouts[flat] = (share, [matrix for matrix in matrices if share.touches(matrix)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step every group whose parameters have gradients."""
        assert closure is None
        groups = self.param_groups
        plain = [group for group in groups if not group.get("muon")]
        if plain:
            self.param_groups = plain
            try:
                super().step()
            finally:
                self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), device=parameter.device)
            state["step"] += 1
            if parameter in self._layouts:
                share, matrices = self._layouts[parameter]
            else:
                share, matrices = Share(0, parameter.numel(), 0), [Matrix(*parameter.shape)]
            weight, gradient = parameter.detach().view(-1), parameter.grad.view(-1)
            momentum = state["exp_avg"].view(-1)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            for chunk, updates in updates_of(gradient, momentum, share, matrices):
                parts = [weight[share.part_of(matrix)] for matrix in chunk]
                torch._foreach_add_(parts, updates, alpha=-chunk[0].rate(group["lr"]))


def updates_of(
    gradient: Tensor, momentum: Tensor, share: Share, matrices: Sequence[Matrix]
) -> Iterator[tuple[list[Matrix], list[Tensor]]]:
    """Yield matrices of one shape and, for each, this share's flat part of its orthogonal update.

    gradient, momentum: float32 [N], of the share; the update is Nesterov's, from both.
    """
    on_gpu = gradient.is_cuda
    dtype = torch.bfloat16 if on_gpu else torch.float32  # CPUs without bfloat16 products emulate them slowly
    across = [matrix for matrix in matrices if not share.holds(matrix)]
    for matrix, whole in zip(across, _exchanged(gradient, momentum, share, across), strict=True):
        update = orthogonalise(whole.view(1, matrix.rows, matrix.columns).to(dtype)).float().reshape(-1)
        yield [matrix], [update[share.within(matrix)]]
    alone: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        if share.holds(matrix):
            alone[matrix.rows, matrix.columns].append(matrix)
    for (rows, columns), same in alone.items():
        many = max(1, (TOGETHER_ON_GPU if on_gpu else TOGETHER) // (rows * columns))
        for begin in range(0, len(same), many):
            chunk = same[begin : begin + many]
            slices = [share.part_of(matrix) for matrix in chunk]
            stacked = torch.stack([gradient[part] for part in slices])
            stacked = stacked.lerp_(torch.stack([momentum[part] for part in slices]), MOMENTUM)
            update = orthogonalise(stacked.view(-1, rows, columns).to(dtype)).float()
            yield chunk, list(update.reshape(len(chunk), -1).unbind())


def _exchanged(gradient: Tensor, momentum: Tensor, share: Share, across: Sequence[Matrix]) -> list[Tensor]:
    """The whole Nesterov update, flat, of each of the matrices ``across`` the borders of ``share``.

    Each rank sends its part to the other ranks of the matrix. All is under way at once: ranks that went from one border
    to the next would wait for each other in a row.
    """
    wholes, operations = [], []
    for matrix in across:
        part = share.part_of(matrix)
        own = gradient[part].lerp(momentum[part], MOMENTUM)
        whole = own.new_empty(matrix.last - matrix.first)
        whole[share.within(matrix)] = own
        wholes.append(whole)
        for other in share.others(matrix):
            peer = torch.distributed.get_global_rank(share.process_group, other.rank)
            operations += [
                torch.distributed.P2POp(torch.distributed.isend, own, peer, share.process_group),
                torch.distributed.P2POp(
                    torch.distributed.irecv, whole[other.within(matrix)], peer, share.process_group
                ),
            ]
    for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return wholes
