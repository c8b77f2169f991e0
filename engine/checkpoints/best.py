"""A record beside the checkpoints of a run names the best one by validation."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mirl.engine.checkpoints.files import name_of, write_whole

RECORD = "best.json"
NAMES = {"last": "the weights as trained", "ema": "the average of the weights (EMA)"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A standing is the result of an evaluation.

    weights: the better ones, "last" as training left them, or "ema" their average. score_percent: the higher the
    better; ``metric`` names it. images: the size of the evaluated set.
    """

    weights: str
    score_percent: float
    images: int
    metric: str = "top-1"


@dataclass(frozen=True, kw_only=True)
class Best(Standing):
    """The best evaluation of a run came after ``step`` optimiser steps, which are ``epoch`` epochs."""

    step: int
    epoch: float

    @property
    def checkpoint(self) -> str:
        """Return the name of the folder of its checkpoint."""
        return name_of(self.step)

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:g} (step {self.step}), {self.metric} {self.score_percent:.2f}% of {self.images} images "
            f"with {NAMES[self.weights]}"
        )


def read_best(folder: Path) -> Best | None:
    """Return the record in a folder of checkpoints; None if there is no record, or none that can be read."""
    try:
        values = json.loads((folder / RECORD).read_text())
        values = {
            "metric": "top-1",
            "score_percent": values.get("top1_percent"),
        } | values  # as in older records
        found = Best(**{item.name: values[item.name] for item in fields(Best)})
        return found if found.weights in NAMES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_best(folder: Path, best: Best) -> None:
    """Record ``best``; its checkpoint must be in ``folder``. The record before it holds until this one is whole."""
    write_whole(folder / RECORD, json.dumps(asdict(best) | {"checkpoint": best.checkpoint}, indent=1) + "\n")


def remove_best(folder: Path) -> None:
    """Take the record away; its checkpoint stays. A folder that cannot be written keeps the record."""
    with contextlib.suppress(OSError):
        (folder / RECORD).unlink(missing_ok=True)
