"""A segmentation run has the settings of any run, and further ones for a segmenter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mirl.dataloaders.sources.label_map import LARGEST, LabelMap
from mirl.engine.configuration.config import Config, section_from_dict, setting
from mirl.engine.models.config import ATTENTION_BACKENDS, ModelConfig
from mirl.errors import UserError
from mirl.settings import Section

NORMS = ("batch", "group")
EVAL_MODES = ("slide", "whole")


@dataclass(frozen=True, kw_only=True)
class SegmentSection(Section):
    """This section sets the encoder, heads, label images, augmentation and evaluation."""

    checkpoint: str = setting(
        "", "checkpoint of any kind to take the encoder from, or folder of a run (its newest good one)", metavar="PATH"
    )
    fresh: bool = setting(False, "an encoder of random weights, of the checkpoint's shape: to compare with")
    labels: tuple[str, ...] = setting((), "folder(s) of label images, beside those of --data", metavar="DIR")
    val: tuple[str, ...] = setting(
        (), "images to evaluate on, as --data; none: the other split of --data, if it has one", metavar="PATH"
    )
    val_labels: tuple[str, ...] = setting((), "folder(s) of label images, beside those of --val", metavar="DIR")
    label_map: str = setting(
        "",
        "what the values of label images mean: a file of lines VALUE NAME (the name ignore ignores), or ade20k, "
        "cityscapes, cityscapes_train_ids, voc; none: label-map.txt beside the images, what the layout says, or each "
        "value found is a class",
        metavar="FILE|NAME",
    )
    ignore: tuple[int, ...] = setting((), "further values of label images that are ignored", metavar="VALUE")
    eval_every: float = setting(0.0, "epochs between evaluations; 0: ten in a run")
    image_height: int = setting(0, "height of the crops in pixels")
    image_width: int = setting(0, "width of the crops in pixels")
    scale: tuple[float, float] = setting(
        (0.5, 2.0), "range of the shorter side of an image, in shorter sides of the crop, before it is cropped"
    )
    cat_max_ratio: float = setting(0.75, "a crop of which one class has a greater share is drawn again")
    photometric: bool = setting(True, "vary brightness, contrast, saturation and hue")
    attention: str = setting("auto", "attention backend", choices=ATTENTION_BACKENDS)
    layer_decay: float = setting(0.65, "factor of the learning rate from a layer to the one below it")
    drop_path: float = setting(0.1, "largest rate of stochastic depth, rising linearly over the blocks")
    norm: str = setting(
        "batch", "norms of pyramid and heads; batch: over the images of all ranks; group: of each image", choices=NORMS
    )
    head_channels: int = setting(0, "channels of the decode head; 0: the width of the encoder")
    eval_mode: str = setting(
        "slide", "slide: windows of the size of the crops; whole: all of an image at once", choices=EVAL_MODES
    )
    eval_stride: int = setting(0, "pixels from window to window; 0: two thirds of the crop")
    eval_scales: tuple[float, ...] = setting((1.0,), "scales that an evaluation averages over", metavar="X")
    eval_flip: bool = setting(False, "an evaluation averages over mirrored images too")

    def check(self) -> None:
        for name in ("eval_every", "image_height", "image_width", "head_channels", "eval_stride"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale is {self.scale}: give 0 < MIN <= MAX, e.g. 0.5 2")
        if not 0 < self.cat_max_ratio <= 1:
            raise UserError(f"cat_max_ratio is {self.cat_max_ratio}: give a share above 0 and up to 1; 1: any crop")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}: give a factor above 0 and up to 1; 1 is none")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path is {self.drop_path}: give a rate of at least 0 and below 1")
        if not self.eval_scales or min(self.eval_scales) <= 0:
            raise UserError(f"eval_scales is {self.eval_scales}: give positive factors, e.g. 0.5 1 1.5")
        for name, choices in (("norm", NORMS), ("eval_mode", EVAL_MODES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for value in self.ignore:
            if not 0 <= value <= LARGEST:
                raise UserError(f"ignore is {value}: give values from 0 to {LARGEST}")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(Config):
    """This is the configuration of one segmentation run.

    source, model: the pre-trained encoder, and the encoder as it is trained here (the size of the crops, all of its
    depth); known once the checkpoint has been read. labels: the meaning of the values in label images, known once they
    have been looked at.
    """

    segment: SegmentSection
    source: ModelConfig | None = None
    model: ModelConfig | None = None
    labels: LabelMap | None = None

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
    def label_map(self) -> LabelMap:
        """Return ``labels``, once the label images have been looked at."""
        assert self.labels is not None
        return self.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes by number."""
        return self.label_map.names

    def resized(self, model: ModelConfig) -> ModelConfig:
        """Return ``model`` at the size of the crops that was asked for, or at its own."""
        section = self.segment
        if not section.image_height:
            return model
        return dataclasses.replace(model, image_height=section.image_height, image_width=section.image_width)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> SegmentConfig:
        """Read as `Config.from_dict` does, with the two models and the meaning of the labels."""
        made = super().from_dict(values, source=source)
        models = {
            name: section_from_dict(ModelConfig, values[name], source=source)
            for name in ("source", "model")
            if values.get(name)
        }
        labels = LabelMap.from_dict(values["labels"]) if values.get("labels") else None
        return dataclasses.replace(made, labels=labels, **models)
