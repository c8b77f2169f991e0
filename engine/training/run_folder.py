"""Where a run writes, which checkpoint it starts from, and how far that checkpoint has come."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from mirl.dataloaders import TrainLoader
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.checkpoints.reader import CheckpointReader, find_newest_good, locate
from mirl.engine.configuration.config import Config
from mirl.engine.training.folder_probe import probe_folder
from mirl.engine.training.run_lock import NAME as LOCK_NAME
from mirl.engine.training.run_lock import RunLock
from mirl.errors import UserError


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. ``step`` counts batches, ``applied_steps`` those whose update was applied.

    best: of the metrics of a task that keeps them here, the best value so far and its step.
    ``recent_losses`` and ``recent_norms``: of the last steps, what the bands of `mirl.engine.training.spikes` rest on.
    ``left_out``: steps, from 1, whose images are passed over; ``rollbacks``: in a row, the last one to a checkpoint of
    ``rolled_back_to`` applied steps (`mirl.engine.training.rollback`).
    """

    step: int = 0
    applied_steps: int = 0
    nonfinite_in_a_row: int = 0
    images: int = 0
    best: dict[str, list[float]] = field(default_factory=dict)
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rollbacks: int = 0
    rolled_back_to: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in the state of a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, from the state of a checkpoint, which holds other keys too.

        Checkpoints of before the best values, the bands or rollbacks lack those: they begin anew.
        """
        since = {"best", "recent_losses", "recent_norms", "left_out", "rollbacks", "rolled_back_to"}
        found = {item.name: state[item.name] for item in fields(cls) if item.name in state or item.name not in since}
        found["best"] = {name: list(value) for name, value in state.get("best", {}).items()}
        return cls(**found)


def choose_out(config: Config, recipe_out: str) -> Path:
    """Choose the run's folder.

    The recipe's own name is numbered when it is taken. A folder that the user named is never written over.

    Raises:
        UserError: the user named a folder that holds a run, and does not resume.
    """
    out = Path(config.run.out)
    named = config.run.out != recipe_out
    begun = not named and (out / LOCK_NAME).exists()  # by another start, a moment ago
    if config.run.resume or not (_holds_a_run(out) or begun):
        return out
    if named:
        raise UserError(
            f"out is {out}, which holds a run already: go on with it by --resume auto, or give another --out"
        )
    taken = [
        int(match[1])
        for path in out.parent.glob(f"{out.name}-*")
        if (match := re.fullmatch(rf"{re.escape(out.name)}-(\d+)", path.name))
    ]
    return out.with_name(f"{out.name}-{max(taken, default=1) + 1}")


def _holds_a_run(out: Path) -> bool:
    return (out / "config.json").exists() or (out / "checkpoints").exists()


def hold_folder(lock: RunLock, out: Path) -> list[str]:
    """Take ``lock`` of ``out`` and try whether a run can be kept there; returns lines for the log.

    Raises:
        UserError: a live run holds the folder, or it cannot hold checkpoints.
    """
    lock.make_folder()
    probe_folder(out)
    return lock.acquire()


def choose_start(config: Config, out: Path) -> tuple[Path | None, list[str]]:
    """``(checkpoint, remarks)``: whose weights the run starts from, None for fresh ones.

    Raises:
        UserError: no checkpoint in ``out`` is whole, or the one that was named is not there.
    """
    if config.run.resume == "auto":
        found, remarks = find_newest_good(out / "checkpoints")
        if found is None and remarks:
            raise UserError(
                f"no checkpoint in {out / 'checkpoints'} is whole: {'; '.join(remarks)}; move it away to start afresh"
            )
        if found is None:
            return None, [f"FRESH START: --resume auto found no checkpoint in {out / 'checkpoints'}"]
        return found, [*remarks, f"resumed from {found}"]
    if config.run.resume:
        found = locate(Path(config.run.resume))
        return found, [f"resumed from {found}"]
    if config.run.init_from:
        found = locate(Path(config.run.init_from))
        return found, [f"weights from {found}, everything else fresh"]
    return None, []


def restore_progress(reader: CheckpointReader, loader: TrainLoader) -> Progress:
    """Read how far the checkpoint of ``reader`` has come, and set ``loader`` there.

    Raises:
        UserError: the checkpoint was imported, or trained on other data.
    """
    state = reader.state
    if "optim" not in state["config"]:
        raise UserError(
            f"{reader.path} was imported: it holds weights alone, and no run to resume; start one by --init-from"
        )
    loader.load_state_dict(state["loader"])
    return Progress.from_state(state)


def write_config(config: Config, out: Path, step: int) -> None:
    """Write config.json, the configuration of the present, into ``out``.

    The one that it takes the place of, if it says something else, becomes a line of config-history.jsonl: an object
    with the ``step`` up to which the run had it, the ``time`` of the change and the ``config``.
    """
    path = out / "config.json"
    if path.exists() and (old := _as_json(path)) != json.loads(config.to_json()):
        with (out / "config-history.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "time": time.time(), "config": old}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    write_whole(path, config.to_json())


def _as_json(path: Path) -> Any:
    """What ``path`` holds; its text where that is no JSON, because it was edited."""
    text = path.read_text(errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def refuse_finished(out: Path, step: int, total_steps: int) -> None:
    """UserError where a resumed run has nothing left to do."""
    if step >= total_steps:
        raise UserError(f"{out} is finished: {step} of {total_steps} steps; give more --steps or --epochs to go on")
