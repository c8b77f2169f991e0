"""Take the optimiser step of ZeRO 1 and 2 in one pass over the flat buffers (`mirl.kernels.flat_adamw`).

Nothing here touches DeepSpeed: `deepspeed_patches.step_in_one_pass` reads its buffers and replaces its step by this.

The gradients come as `FlatGradients` has them, in the compute dtype and added up over ranks. One pass averages and
clips them, updates the fp32 state that checkpoints save, and writes the compute weights. The host queues the pass
before it knows whether the gradient is finite: the pass itself checks this on the device, and writes nothing if it is
not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirl.kernels.flat_adamw import Coefficients, flat_adamw


@dataclass(frozen=True, kw_only=True)
class OwnedGroup:
    """This rank's part of one parameter group has, all [N], float32 ``master`` and moments, and the compute ``weight``.

    ``taken``: how many steps were applied, as torch.optim.AdamW counts them, float32 []. ``settings``: the live group
    of the optimiser, whose learning rate changes.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor
    taken: Tensor
    settings: Mapping[str, Any]


class FetchedLater:
    """A scalar is on its way from the device: work that is queued after it does not delay it."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """Return the scalar on the host, after waiting for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


class OnePassAdamW:
    """Take steps of AdamW with weight decay for ``groups``.

    ``norm``: a function from each rank's part of the sums to the norm of the averaged gradient over all groups and
    ranks, on their device. ``ranks``: how many ranks' gradients are added up. ``clip``: largest norm, 0 for none.
    """

    def __init__(
        self, groups: Sequence[OwnedGroup], *, norm: Callable[[Sequence[Tensor]], Tensor], ranks: int, clip: float
    ) -> None:
        self._groups, self._norm, self._ranks, self._clip = groups, norm, ranks, clip
        self._taken: int | None = None

    def forget_count(self) -> None:
        """Read the number of steps again, because it was set from outside."""
        self._taken = None

    def step(self, sums: Sequence[Tensor], spread: Callable[[], None]) -> Tensor:
        """Take a step with this rank's ``sums`` of gradients, one a group, and ``spread`` the weights to other ranks.

        Returns the norm before clipping, on the host. If it is not finite, nothing was changed.
        """
        if self._taken is None:
            self._taken = round(float(self._groups[0].taken))
        norm = self._norm(sums)
        fetched = FetchedLater(norm)
        for group, gradient in zip(self._groups, sums, strict=True):
            settings = group.settings
            numbers = Coefficients.of_step(
                self._taken + 1, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"],
                weight_decay=settings["weight_decay"], average=1 / self._ranks, clip=self._clip,
            )  # fmt: skip
            flat_adamw(gradient, group.master, group.exp_avg, group.exp_avg_sq, group.weight, norm, numbers)
        spread()
        found = fetched.get()
        if bool(found.isfinite()):
            self._taken += 1
            for group in self._groups:
                group.taken.fill_(self._taken)
        return found
