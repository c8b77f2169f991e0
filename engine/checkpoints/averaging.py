"""Write weights averaged over several checkpoints, or a run's own average, as a checkpoint of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirl.engine.checkpoints.files import list_checkpoints, write_weights
from mirl.engine.checkpoints.finding import verify
from mirl.engine.checkpoints.kinds import ENCODER, PRETRAINED, require_kind
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.errors import UserError

EMA = "ema"
"""The fragments of a run's own average of its weights have this kind."""


def newest_of(run: Path, count: int) -> list[Path]:
    """Return the newest ``count`` checkpoints of a run, oldest first.

    Raises:
        UserError: there are fewer, or one of them is damaged. An average of others is not what was asked for.
    """
    if count < 2:
        raise UserError(f"average is {count}: give 2 checkpoints or more")
    for folder in (run, run / "checkpoints"):
        if found := list_checkpoints(folder):
            break
    else:
        raise UserError(f"{run} is no run with checkpoints: give the run's folder")
    if len(found) < count:
        raise UserError(
            f"average is {count} and {run} has {len(found)} checkpoints: give at most that many, or train with "
            f"--keep-checkpoints {count}"
        )
    for path in found[-count:]:
        if problem := verify(path):
            raise UserError(f"checkpoint {path} is damaged: {problem}; give fewer, or remove it")
    return found[-count:]


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """Average each parameter over checkpoints of one architecture, added up in float64: fp32, by name."""
    readers = [CheckpointReader(path) for path in checkpoints]
    for reader in readers:
        require_kind(reader.state, reader.path, "an average", PRETRAINED, ENCODER)
        reader.require_same_model(readers[0].shapes)
    made = {}
    for name, shape in readers[0].shapes.items():
        size = torch.Size(shape).numel()
        total = torch.zeros(size, dtype=torch.float64)
        for reader in readers:
            total += reader.read(name, "weight", 0, size)
        made[name] = (total / len(readers)).float().reshape(shape)
    return made


def ema_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the average that a pre-training run with --ema kept: fp32, by name.

    Raises:
        UserError: the checkpoint has no average.
    """
    reader = CheckpointReader(checkpoint)
    require_kind(reader.state, checkpoint, "an average", PRETRAINED, ENCODER)
    if not (reader.state["config"].get("optim") or {}).get("ema"):
        raise UserError(f"{checkpoint} holds no average of its weights: pre-train with --ema 0.9999, or give --average")
    return {
        name: reader.read(name, EMA, 0, torch.Size(shape).numel()).reshape(shape)
        for name, shape in reader.shapes.items()
    }


def write_average(out: Path, checkpoints: Sequence[Path], *, ema: bool = False) -> None:
    """Write the mean of ``checkpoints``, or the ``ema`` of the one, as a checkpoint that every command takes.

    The checkpoint has no moments: a run starts from it by --init-from, and cannot go on from it. Raises the UserErrors
    of the functions above, and one if ``out`` exists.
    """
    weights = ema_weights(checkpoints[0]) if ema else mean_weights(checkpoints)
    last = CheckpointReader(checkpoints[-1]).state
    state: dict[str, Any] = {
        "step": last.get("step", 0),
        "source": {"average": EMA if ema else "mean", "of": [path.name for path in checkpoints]},
        "config": {"model": last["config"]["model"]},
    }
    write_weights(out, weights, state)
