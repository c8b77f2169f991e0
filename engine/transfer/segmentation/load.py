"""Load a segmenter from its checkpoint, in one call and without a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from mirl.engine.checkpoints.kinds import SEGMENTER, given
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.engine.transfer.segmentation.inference import View
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.engine.transfer.segmentation.task import load_buffers


def load_segmenter(
    path: Path | str, *, which: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Segmenter, SegmentConfig]:
    """Load the trained model (fp32, in eval mode) and its run's configuration, with the names of its classes.

    path: a checkpoint, or the folder of a run. which: of a run, "best" by validation or "last", the newest; None: the
    best if there is one.

    Raises:
        UserError: ``path`` has no such checkpoint, a damaged one, or one of another kind.

    >>> model, config = load_segmenter("runs/segment")                           # doctest: +SKIP
    >>> probabilities = predict(model, image, view_of(config), torch.device("cpu"))  # doctest: +SKIP
    """
    found = given(path, which).require("load_segmenter", SEGMENTER)
    reader = CheckpointReader(found.checkpoint)
    config = SegmentConfig.from_dict(reader.state["config"], source=str(reader.path / "state.json"))
    model = build_segmenter(config)
    reader.require_same_model({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, weight in reader.weights().items():
            model.get_parameter(name).copy_(weight)
    load_buffers(model, reader.read)
    return model.to(device).eval(), config


def build_segmenter(config: SegmentConfig) -> Segmenter:
    """Build the model of a configuration in which nothing is open, with fresh weights."""
    section = config.segment
    return Segmenter(
        config.encoder, num_classes=len(config.classes), head_channels=section.head_channels, norm=section.norm,
        drop_path=section.drop_path, position_grid=config.pretrained.grid,
    )  # fmt: skip


def view_of(config: SegmentConfig) -> View:
    """Return how the run looks at images in its evaluations."""
    section, model = config.segment, config.encoder
    return View(
        crop=(model.image_height, model.image_width), mode=section.eval_mode, stride=section.eval_stride,
        scales=section.eval_scales, flip=section.eval_flip,
    )  # fmt: skip
