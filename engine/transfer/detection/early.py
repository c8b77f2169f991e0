"""Refuse a detection run before torch is imported, and fill in the demo's data.

The run checks everything again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mirl.dataloaders.tools.composite_sets import prepare_composites
from mirl.engine.checkpoints.finding import locate
from mirl.engine.transfer.detection.annotations import CocoSet, require_same_classes
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.errors import UserError

DEMO_RUN = "runs/demo"  # mirl pretrain without flags writes there


def with_demo(config: DetectConfig) -> DetectConfig:
    """Return ``config``; for recipe demo, fill in composites and the demo's encoder if they are not given.

    UserError if this encoder has not been pre-trained yet.
    """
    if config.recipe != "demo":
        return config
    section, data = config.detect, config.data
    if not section.checkpoint and not config.run.resume:
        if not Path(DEMO_RUN, "checkpoints").is_dir():
            raise UserError(
                f"checkpoint is not given and {DEMO_RUN} is not there: run mirl pretrain first, which takes some "
                "minutes, or give --checkpoint"
            )
        section = dataclasses.replace(section, checkpoint=DEMO_RUN)
    if not data.data:
        root = prepare_composites()
        data = dataclasses.replace(data, data=(str(root / "train"),))
        section = dataclasses.replace(
            section, annotations=str(root / "train.json"), val=str(root / "val"), val_annotations=str(root / "val.json")
        )
    return dataclasses.replace(config, detect=section, data=data)


def require_inputs(config: DetectConfig) -> None:
    """Raise UserError if data, annotations, or a checkpoint to start from, is not given."""
    section, data = config.detect, config.data.data
    if not data:
        raise UserError("data is not given: name the folder of the images that --annotations lists")
    if len(data) > 1:
        raise UserError(f"data is {' '.join(data)}: give one folder, which the file names of --annotations start from")
    if not section.annotations:
        raise UserError("annotations is not given: name a COCO file (JSON) of the images in --data")
    if section.val and not section.val_annotations:
        raise UserError(f"val is {section.val} and val_annotations is not given: name the COCO file of these images")
    if not config.run.resume and not section.checkpoint:
        raise UserError("checkpoint is not given: name a pre-trained checkpoint, or the folder of a run")


def open_sets(config: DetectConfig) -> tuple[CocoSet, CocoSet | None]:
    """Open the pictures to train and to evaluate on, and check their annotations whole.

    UserError as in `CocoSet`, or if the classes of the two differ, or no picture has an object.
    """
    section = config.detect
    train = CocoSet(section.annotations, config.data.data[0], degenerate=section.degenerate)
    if train.objects_in_all == train.crowds:
        raise UserError(f"annotations is {section.annotations}, which has no object to learn: give a file with some")
    if not section.val_annotations:
        return train, None
    val = CocoSet(section.val_annotations, section.val or config.data.data[0], degenerate=section.degenerate)
    require_same_classes(train, val)
    return train, val


def refuse_early(config: DetectConfig) -> None:
    """Raise what the run would raise some seconds later. UserError as `require_inputs`, `locate` and `open_sets`."""
    require_inputs(config)
    if not config.run.resume:
        locate(Path(config.detect.checkpoint))
    open_sets(config)
