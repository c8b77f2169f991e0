"""What the training loop asks of the thing it trains: pre-training and fine-tuning each are one `Task`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mirl.dataloaders import Batch
from mirl.engine.checkpoints.best import Standing
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a micro-batch stands in a run: images ``first`` ... of the effective batch of step ``step`` (from 0).

    Randomness keyed by it is the same however many ranks and accumulations share the effective batch.
    """

    step: int
    first: int


class Task(Protocol):
    """All ranks make the same calls in the same order."""

    term_names: tuple[str, ...]
    """Names of the parts of the loss, in the order of the terms that `forward` returns."""
    gflops_per_image: float
    """Floating-point operations of forward and backward on one image, in units of 1e9, for the utilisation; those that
    are left after the exact skips.
    """
    plain_gflops_per_image: float
    """The same of the unskipped model."""
    report_images: int
    """Images that one report passes through the model without gradients, on all ranks together."""

    def forward(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and its unweighted terms ([len(term_names)], detached) of one micro-batch."""
        ...

    def after_step(self, applied: bool) -> None:
        """After every optimiser step; ``applied`` is False where it was skipped."""
        ...

    def standing_at_start(self) -> Standing | None:
        """How good the weights are that a fresh run begins with, the same on all ranks, where that is known."""
        ...

    def report(self, step: int, *, last: bool, interrupted: Callable[[], bool]) -> Standing | None:
        """What the task shows of itself after ``step``: pictures, an evaluation. Returns how good the weights are, the
        same on all ranks, where it was measured; the best ones are kept.

        One that takes long asks ``interrupted`` now and then, on all ranks, and ends early where that is True.
        """
        ...

    def reports_after(self, step: int, total_steps: int) -> int:
        """How many reports, of a run of ``total_steps``, are due after ``step``: what the time left has to include."""
        ...

    def fragments(self) -> Iterable[Fragment]:
        """This rank's part of the task's own state, saved beside weights and moments."""
        ...

    def load(self, read: FragmentReader) -> None:
        """Set the task's own state from a checkpoint that `fragments` was saved in; called where a run is resumed.

        Raises:
            UserError: the checkpoint was written by a run without that state.
        """
        ...
