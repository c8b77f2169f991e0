"""A plan says which groups of blocks are recomputed in the backward pass, and by which function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mirl.errors import UserError

# checkpoint_fn(function, *tensors): torch.utils.checkpoint.checkpoint, or another of the same contract.
CheckpointFunction = Callable[..., Any]

DEFAULT_CHECKPOINT: CheckpointFunction = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class CheckpointPlan:
    """The plan recomputes ``group`` blocks together; 0: none; None: a whole segment or decoder at a time."""

    group: int | None = 0
    function: CheckpointFunction = DEFAULT_CHECKPOINT

    @classmethod
    def make(cls, mode: str | int, function: CheckpointFunction | None = None) -> CheckpointPlan:
        """Make the plan of ``mode``: "none", "every", "segments", or a number of blocks (digits, too).

        UserError for any other mode.
        """
        named = {"none": 0, "every": 1, "segments": None}
        function = function or DEFAULT_CHECKPOINT
        if mode in named:
            return cls(named[mode], function)
        if str(mode).isdigit() and int(mode) > 0:
            return cls(int(mode), function)
        raise UserError(
            f"activation checkpointing is {mode!r}: give none, every, segments, or a positive number of blocks"
        )

    def groups(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of each group of blocks in [start, stop). Without recomputation all are one group."""
        step = self.group or stop - start
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def call(self, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """Return ``function(*tensors)``, recomputed in the backward pass if the plan says so."""
        if self.group == 0:
            return function(*tensors)
        return self.function(function, *tensors)
