"""Which image is seen where: a permutation per epoch, and the slice of it that one micro-batch of one rank takes.

An optimiser step consumes EB = micro_batch * accumulation * world_size images. Step s of an epoch takes positions
s*EB ... s*EB + EB - 1 of the epoch's permutation, so the images of a step depend on (seed, step) alone; the ranks only
divide them. The remainder of N / EB is dropped, another remainder each epoch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mirl.errors import UserError
from mirl.keyed import keyed_u64

_ORDER_STREAM = 1  # first key word: keeps the order's numbers apart from those of the crops


def epoch_permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all images in one epoch: ids [N], int32 where they fit, else int64.

    The ids are sorted by a 64-bit hash of (seed, epoch, id). For N = 1.28 M that takes about 0.15 s; ties (chance
    N^2 / 2^65) keep the order of the ids.
    """
    keys_N = keyed_u64(_ORDER_STREAM, seed, epoch, np.arange(num_images))
    order_N = np.argsort(keys_N, kind="stable")
    return order_N.astype(np.int32) if num_images < 2**31 else order_N


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How one run divides the data; every argument is checked when the plan is made.

    micro_batch, accumulation, world_size: images per forward pass of a rank, forward passes per step, ranks.
    """

    num_images: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        for field in ("micro_batch", "accumulation", "world_size"):
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"{field} is {value}, must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, must be in 0..{self.world_size - 1} (world_size {self.world_size})")
        if self.num_images < self.effective_batch:
            raise UserError(
                f"the data set has {self.num_images} images, fewer than one step of {self.effective_batch} "
                f"(micro_batch {self.micro_batch} x accumulation {self.accumulation} x world_size {self.world_size}); "
                f"lower the batch to at most {self.num_images} or add images"
            )

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.effective_batch

    def locate(self, micro_step: int) -> tuple[int, np.ndarray]:
        """(epoch, positions int64 [micro_batch]) of this rank's forward pass number `micro_step` since step 0."""
        step, micro = divmod(micro_step, self.accumulation)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.effective_batch + (micro * self.world_size + self.rank) * self.micro_batch
        return epoch, np.arange(first, first + self.micro_batch)


class EpochOrder:
    """Permutations by epoch; the next epoch's is computed in the background, so that no step waits at the border."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mirl-order")
        self._orders: dict[int, Future[np.ndarray]] = {}

    def __call__(self, epoch: int) -> np.ndarray:
        """Ids [N] of one epoch, in the order in which they are seen."""
        for wanted in (epoch, epoch + 1):
            if wanted not in self._orders:
                self._orders[wanted] = self._pool.submit(epoch_permutation, self.num_images, self.seed, wanted)
        for stale in [e for e in self._orders if e not in (epoch, epoch + 1)]:
            del self._orders[stale]
        return self._orders[epoch].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
