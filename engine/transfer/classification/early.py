"""Refuse a fine-tuning run before torch is imported: a missing checkpoint, missing data, classes that differ.

The run checks everything again, and sees faults that these quick looks do not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mirl.dataloaders.sources.listing import split_folder
from mirl.dataloaders.sources.opening import open_source
from mirl.engine.checkpoints.files import list_checkpoints
from mirl.engine.checkpoints.finding import locate
from mirl.engine.transfer.classification.classes import require_same_classes
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.errors import UserError


def refuse_early(config: FinetuneConfig) -> None:
    """Raise what the run would raise some seconds later, if a look at names is enough.

    Raises:
        UserError: no data or no checkpoint is given, one of them does not exist, or the classes of training and
        evaluation data differ.
    """
    data, val = config.data.data, config.finetune.val
    require_inputs(config)
    if not config.run.resume:
        checkpoint = Path(config.finetune.checkpoint)
        if not (
            _is_checkpoint(checkpoint) or list_checkpoints(checkpoint) or list_checkpoints(checkpoint / "checkpoints")
        ):
            locate(checkpoint)  # it raises; other checkpoints are spared, because it reads them whole
    index_dir = config.data.index_dir or None
    for root, split in (*((root, "train") for root in data), *((root, "val") for root in val)):
        if not Path(root).expanduser().exists():
            open_source(root, split=split)  # raises
    ours, theirs = _class_folders(data, "train"), _class_folders(val, "val")
    # Folders without images make no class. The data is listed here only if names differ, because the run lists it too.
    if val and ours is not None and theirs is not None and ours != theirs:
        train = open_source(data, labels=True, index_dir=index_dir, split="train")
        other = open_source(val, labels=True, index_dir=index_dir, split="val")
        require_same_classes(train.classes, other.classes, train="data", val="val")


def require_inputs(config: FinetuneConfig) -> None:
    """Raise UserError if data, or a checkpoint to start from, is not given."""
    if not config.data.data:
        raise UserError("data is not given: name a folder with a sub-folder of images for each class")
    if not config.run.resume and not config.finetune.checkpoint:
        raise UserError("checkpoint is not given: name a pre-trained checkpoint, or the folder of a run")


def _is_checkpoint(path: Path) -> bool:
    return (path / "manifest.json").is_file() or (path / "state.json").is_file()


def _class_folders(roots: Sequence[str], split: str) -> set[str] | None:
    """Return the names of the first level of folders; None if a root is no folder, or cannot be read."""
    names: set[str] = set()
    for root in roots:
        try:
            with os.scandir(split_folder(Path(root).expanduser(), split)) as entries:
                names |= {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
        except OSError:
            return None
    return names
