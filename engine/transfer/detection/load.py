"""Make a detector from its configuration, or from a checkpoint in one call and without a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from mirl.engine.accounting.detection import DetectorShape
from mirl.engine.checkpoints.kinds import DETECTOR, given
from mirl.engine.checkpoints.pretrained import load_weights
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.engine.transfer.detection.detector import Detector
from mirl.engine.transfer.detection.windows import global_blocks


def build_detector(config: DetectConfig, classes: int) -> Detector:
    """Build the detector of a run whose checkpoint has been read, with fresh weights. classes: without background."""
    section = config.detect
    return Detector(
        config.encoder, classes=classes, variant=section.variant, window=section.window, drop_path=section.drop_path,
        position_grid=config.pretrained.grid, box_loss=section.box_loss, regions=section.regions,
        channels=section.channels, proposals=section.proposals,
    )  # fmt: skip


def shape_of(config: DetectConfig, classes: int) -> DetectorShape:
    """Return the sizes that decide the cost of such a detector."""
    section = config.detect
    four = 4 if section.variant == "paper" else len(global_blocks(config.encoder.depth))
    return DetectorShape(
        variant=section.variant, window=section.window, global_blocks=four, channels=section.channels,
        regions=section.regions, classes=classes,
    )  # fmt: skip


def load_detector(
    path: Path | str, *, which: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Detector, DetectConfig]:
    """Load the detector (fp32, in eval mode) and its run's configuration, with the names of its classes.

    path, which: see `mirl.engine.checkpoints.kinds.given`. UserError for no such checkpoint, or a damaged one.

    >>> model, config = load_detector("runs/detect")                                # doctest: +SKIP
    """
    found = given(path, which).require("load_detector", DETECTOR)
    reader = CheckpointReader(found.checkpoint)
    config = DetectConfig.from_dict(reader.state["config"], source=str(reader.path / "state.json"))
    model = build_detector(config, len(config.classes))
    load_weights(model, reader)
    return model.to(device).eval(), config
