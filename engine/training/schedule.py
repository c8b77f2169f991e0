"""Durations and learning rates, in optimiser steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirl.engine.configuration.config import LogConfig, OptimConfig, RunConfig
from mirl.errors import UserError

LINES = 60  # of the log, beside evaluations, however long the run is


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a function of the number of applied steps.

    Steps that were skipped for non-finite gradients do not count, so the curve is that of the updates the weights
    really had.
    """

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    shape: str
    step_at: tuple[float, ...] = (0.90, 0.95)

    def lr(self, applied_steps: int) -> float:
        """Learning rate of the next step, once ``applied_steps`` steps have been applied.

        Linear warm-up from peak / warmup_steps, then half a cosine to ``min_lr``, or (`shape` = poly) a straight line
        to it, or (step) the peak times 0.1 from each share of the run in ``step_at`` on.
        """
        if applied_steps < self.warmup_steps:
            return self.peak_lr * (applied_steps + 1) / self.warmup_steps
        if self.shape == "step":
            share = applied_steps / self.total_steps
            passed = sum(share >= start for start in self.step_at)
            return self.peak_lr * (1.0, 0.1, 0.01)[passed] if passed < 3 else self.peak_lr * 0.1**passed
        share = (applied_steps - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.shape == "poly":
            return self.min_lr + (self.peak_lr - self.min_lr) * (1 - min(1.0, share))
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def lengths(optim: Mapping[str, Any], steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the run and of its warm-up, from the fields of an `OptimConfig` by name."""
    total = optim["steps"] or math.ceil(optim["epochs"] * steps_per_epoch)
    share = round(optim.get("warmup_share", 0.0) * total)
    return total, optim["warmup_steps"] or round(optim["warmup_epochs"] * steps_per_epoch) or share


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Every length of a run, converted to optimiser steps once."""

    total_steps: int
    warmup_steps: int
    checkpoint_every: int
    log_every: int
    picture_every: int

    @classmethod
    def resolve(cls, optim: OptimConfig, run: RunConfig, log: LogConfig, *, steps_per_epoch: int) -> Durations:
        """Durations for a data set of ``steps_per_epoch`` steps an epoch; UserError when the warm-up fills the run."""
        total, warmup = lengths(dataclasses.asdict(optim), steps_per_epoch)
        if warmup >= total:
            raise UserError(
                f"the warm-up takes {warmup} of {total} steps: shorten --warmup-epochs / --warmup-steps or train longer"
            )
        return cls(
            total_steps=total,
            warmup_steps=warmup,
            checkpoint_every=run.checkpoint_every or max(1, math.ceil(total / 20)),
            log_every=log.log_every or math.ceil(total / LINES),
            picture_every=log.picture_every or max(1, math.ceil(total / 6)),
        )

    def schedule(self, optim: OptimConfig) -> Schedule:
        return Schedule(
            peak_lr=optim.peak_lr,
            min_lr=optim.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            shape=optim.schedule,
            step_at=optim.step_at,
        )
