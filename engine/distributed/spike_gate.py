"""The gate brings loss and gradient norm of each step to the host, and lets no step outside its limits be taken.

Nothing here touches DeepSpeed: `FlatGradients.norm`, which every step of ZeRO 1 and 2 calls once, calls the gate. The
loss travels with the sum of squares of the gradients, so ranks communicate, and the host waits for the device, as often
as without it. A step outside its limits gets an infinite norm, and so it is skipped as for a gradient that is not
finite, on the device and on all ranks alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirl.engine.distributed.one_pass import FetchedLater


@dataclass(frozen=True)
class SeenStep:
    """A step has the mean loss over ranks and micro-batches, and the norm of the averaged gradient before clipping."""

    loss: float
    gradient_norm: float


@dataclass(eq=False)
class SpikeGate:
    """The gate compares each step with its limits.

    ``micro_batches``: of a step, over all ranks. ``closes``: whether a step outside its limits is not taken.
    ``most_loss`` and ``most_norm``, float32 values, are set before each step and are the largest that pass.
    """

    micro_batches: int
    closes: bool
    most_loss: float = math.inf
    most_norm: float = math.inf
    last: SeenStep | None = field(default=None, init=False)  # the last result of `take`
    _loss: Tensor | None = field(default=None, init=False)
    _seen: FetchedLater | None = field(default=None, init=False)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, a scalar, to those of this rank and step."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def join(self, squares: Tensor) -> Tensor:
        """Put the loss of this rank beside ``squares``, a float32 scalar: float32 [2], to be summed over ranks."""
        assert self._loss is not None, "the loss of a step comes before its gradient norm"
        joined = torch.stack([squares, self._loss.to(squares.device)])
        self._loss = None
        return joined

    def pass_on(self, norm: Tensor, losses: Tensor) -> Tensor:
        """Return ``norm``, or infinity if this step is not to be taken.

        ``losses``: their sum over ranks. All are scalars.
        """
        loss = losses / self.micro_batches
        self._seen = FetchedLater(torch.stack([loss, norm]))
        if not self.closes or math.isinf(self.most_loss) and math.isinf(self.most_norm):
            return norm
        return norm.masked_fill((norm > self.most_norm) | (loss > self.most_loss), math.inf)

    def take(self) -> SeenStep:
        """Return loss and norm of the step just made; the host waited for its norm already."""
        assert self._seen is not None, "no step was made"
        loss, norm = self._seen.get().tolist()
        self._seen, self.last = None, SeenStep(loss, norm)
        return self.last
