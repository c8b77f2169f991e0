"""A detection run has the settings of any run, and further ones for a Mask R-CNN."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mirl.engine.configuration.config import Config, section_from_dict, setting
from mirl.engine.models.config import ATTENTION_BACKENDS, ModelConfig
from mirl.errors import UserError
from mirl.settings import Section

VARIANTS = ("paper", "vitdet")  # repeated here, so that the help waits for no torch
BOX_LOSSES = ("l1", "giou")
DEGENERATE = ("refuse", "drop")
SIZES = 11  # the short side in training has so many: 0.6, 0.64 ... 1 of the largest; 480, 512 ... 800


@dataclass(frozen=True, kw_only=True)
class DetectSection(Section):
    """This section sets the encoder, Mask R-CNN, annotations and evaluation."""

    checkpoint: str = setting(
        "", "pre-trained checkpoint, or folder of a run (its newest good checkpoint)", metavar="PATH"
    )
    annotations: str = setting("", "COCO file (JSON) of the images in --data", metavar="FILE")
    val: str = setting("", "folder of the images to evaluate on; none: that of --data", metavar="DIR")
    val_annotations: str = setting("", "COCO file of the images to evaluate on; none: no evaluation", metavar="FILE")
    eval_every: float = setting(1.0, "epochs between evaluations, besides the one at the end; 0: that one alone")
    variant: str = setting(
        "paper",
        "paper: four maps, BEiT's scales and a feature pyramid, images by their short side; vitdet: the last map, a "
        "simple pyramid, large-scale jitter",
        choices=VARIANTS,
    )
    window: int = setting(0, "attention inside windows of N patches a side, but for four global blocks; 0: all global")
    image_height: int = setting(
        0, "paper: largest short side; vitdet: height of the crop; in pixels (0: of pre-training)"
    )
    image_width: int = setting(0, "paper: largest long side; vitdet: width of the crop")
    smallest: float = setting(0.6, "paper: smallest short side in training, as a share of the largest")
    jitter: tuple[float, float] = setting(
        (0.1, 2.0), "vitdet: smallest and largest scale of an image, 1 being the one that fits"
    )
    box_loss: str = setting("l1", "of the box head: l1, or giou (times 10, of decoded boxes)", choices=BOX_LOSSES)
    regions: int = setting(512, "regions sampled from an image for the box head in training")
    proposals: int = setting(1000, "regions that are proposed in an image, and judged in evaluation")
    degenerate: str = setting("refuse", "annotations without area: refuse the file, or drop them", choices=DEGENERATE)
    attention: str = setting("auto", "attention backend", choices=ATTENTION_BACKENDS)
    layer_decay: float = setting(0.75, "factor of the learning rate from a layer to the one below it")
    drop_path: float = setting(0.1, "largest rate of stochastic depth, rising linearly over the blocks")
    channels: int = setting(256, "channels of the pyramid and of the heads")
    fresh: bool = setting(False, "leave the encoder as it is initialised, to see what its pre-training is worth")

    def check(self) -> None:
        for name in ("eval_every", "window", "image_height", "image_width"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")
        for name, allowed in (("variant", VARIANTS), ("box_loss", BOX_LOSSES), ("degenerate", DEGENERATE)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name, usual in (("regions", 512), ("proposals", 1000), ("channels", 256)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 1 or more, e.g. {usual}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path is {self.drop_path}: give a number of at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}: give a factor above 0 and up to 1; 1 is none")
        if not 0 < self.smallest <= 1:
            raise UserError(f"smallest is {self.smallest}: give a share above 0 and up to 1, e.g. 0.6")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise UserError(f"jitter is {self.jitter}: give 0 < MIN <= MAX, e.g. 0.1 2.0")
        if self.variant == "paper" and self.image_height > self.image_width > 0:
            raise UserError(
                f"image_size is {self.image_height}x{self.image_width}: of variant paper the first number is the "
                f"largest short side and the second the largest long one; give {self.image_width}x{self.image_height}"
            )


@dataclass(frozen=True, kw_only=True)
class DetectConfig(Config):
    """This is the configuration of one detection run.

    source, model: the pre-trained encoder, and the encoder as it is trained, with the image size of the largest padded
    image; known once the checkpoint has been read. classes, category_ids: name and COCO id of labels 1, 2 and so on;
    known once the annotations have been read.
    """

    detect: DetectSection
    source: ModelConfig | None = None
    model: ModelConfig | None = None
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    @property
    def pretrained(self) -> ModelConfig:
        """Return ``source``, once the checkpoint has been read."""
        assert self.source is not None
        return self.source

    @property
    def encoder(self) -> ModelConfig:
        """Return ``model``, once the checkpoint has been read."""
        assert self.model is not None
        return self.model

    @property
    def size(self) -> tuple[int, int]:
        """Return largest short and long side, or height and width of the crop: as asked for, or of pre-training."""
        section, source = self.detect, self.pretrained
        return section.image_height or source.image_height, section.image_width or source.image_width

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> DetectConfig:
        """Read as `Config.from_dict` does, with the two models and the classes."""
        made = super().from_dict(values, source=source)
        models = {
            name: section_from_dict(ModelConfig, values[name], source=source)
            for name in ("source", "model")
            if values.get(name)
        }
        lists = {name: tuple(values.get(name, ())) for name in ("classes", "category_ids")}
        return dataclasses.replace(made, **lists, **models)
