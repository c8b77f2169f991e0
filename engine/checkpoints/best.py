"""The best checkpoint of a run by validation: a record beside the checkpoints that names one of them."""

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
    """What an evaluation found. weights: the better ones, "last" as training left them, or "ema" their average.

    score_percent: the higher the better; ``metric`` says what it is. images: of the set that it was measured on.
    """

    weights: str
    score_percent: float
    images: int
    metric: str = "top-1"


@dataclass(frozen=True, kw_only=True)
class Best(Standing):
    """The best evaluation of a run, after ``step`` optimiser steps, which are ``epoch`` epochs."""

    step: int
    epoch: float

    @property
    def checkpoint(self) -> str:
        """The name of the folder of its checkpoint."""
        return name_of(self.step)

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:g} (step {self.step}), {self.metric} {self.score_percent:.2f}% of {self.images} images "
            f"with {NAMES[self.weights]}"
        )


def read_best(folder: Path) -> Best | None:
    """The record in a folder of checkpoints; None where there is none, or none that can be read."""
    try:
        values = json.loads((folder / RECORD).read_text())
        values = {"metric": "top-1", "score_percent": values.get("top1_percent")} | values  # as records were before
        found = Best(**{item.name: values[item.name] for item in fields(Best)})
        return found if found.weights in NAMES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_best(folder: Path, best: Best) -> None:
    """Record ``best``; its checkpoint must be in ``folder``. The record before it holds until this one is whole."""
    write_whole(folder / RECORD, json.dumps(asdict(best) | {"checkpoint": best.checkpoint}, indent=1) + "\n")


def remove_best(folder: Path) -> None:
    """Take the record away; its checkpoint stays. A folder that cannot be written keeps it."""
    with contextlib.suppress(OSError):
        (folder / RECORD).unlink(missing_ok=True)
