"""A fine-tuning run has the settings of any run, and further ones for a classifier."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mirl.engine.configuration.config import Config, section_from_dict, setting
from mirl.engine.models.config import ATTENTION_BACKENDS, ModelConfig
from mirl.errors import UserError
from mirl.settings import Section

OFF = "off"
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # it is not beside its code, so that the help waits for no torch
HEAD_INITS = ("probe", "random")
# The help shows this for a value that is None until the length of the run and the size of its images are known.
SCALED = "scaled"


@dataclass(frozen=True, kw_only=True)
class FinetuneSection(Section):
    """This section sets the encoder, the head, augmentation and evaluation."""

    checkpoint: str = setting(
        "", "pre-trained checkpoint, or folder of a run (its newest good checkpoint)", metavar="PATH"
    )
    val: tuple[str, ...] = setting((), "labelled images to evaluate on; none: no evaluation", metavar="PATH")
    eval_every: float = setting(1.0, "epochs between evaluations, besides the one at the end; 0: that one alone")
    num_classes: int = setting(0, "classes; 0: the sub-folders of the data")
    pool: str = setting("avg", "avg: mean of the patches; token: the class token", choices=("avg", "token"))
    image_height: int = setting(0, "height of the images in pixels")
    image_width: int = setting(0, "width of the images in pixels")
    attention: str = setting("auto", "attention backend", choices=ATTENTION_BACKENDS)
    train_positions: bool = setting(False, "train the positions, instead of keeping the fixed ones")
    reinit_last: int = setting(0, "initialise the last N blocks afresh before fine-tuning (Fig. 2 of the paper)")
    layer_decay: float = setting(0.88, "factor of the learning rate from a layer to the one below it")
    head_init: str = setting(
        "random",
        "how the head begins: probe, fitted to the features of the encoder as it is; random, near zero",
        choices=HEAD_INITS,
        before="random",
    )
    drop_path: float | None = setting(
        0.0, "largest rate of stochastic depth, rising linearly over the blocks", unset=SCALED
    )
    rand_augment: str | None = setting(
        RAND_AUGMENT, "RandAugment in timm's notation, or off", metavar="FORM|off", unset=SCALED
    )
    random_erase: float | None = setting(0.25, "probability that a part of an image is erased", unset=SCALED)
    mixup: float | None = setting(0.8, "alpha of mixup; 0: off", unset=SCALED)
    cutmix: float | None = setting(1.0, "alpha of cutmix; 0: off", unset=SCALED)
    label_smoothing: float | None = setting(0.1, "share of a target that is spread over all classes", unset=SCALED)
    ema: float = setting(
        0.9999, "largest decay of the average of the weights, evaluated beside the weights themselves; 0: off"
    )

    @property
    def mixes_pairs(self) -> bool:
        """Say whether images of a micro-batch are mixed in pairs, or may be once the length of the run is known."""
        return any(value is None or value > 0 for value in (self.mixup, self.cutmix))

    def check(self) -> None:
        for name in ("eval_every", "num_classes", "image_height", "image_width", "reinit_last"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")
        for name, below_one in (("ema", True), ("drop_path", True)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number of at least 0 and below {below_one:d}")
        if self.head_init not in HEAD_INITS:
            raise UserError(f"head_init is {self.head_init!r}: choose one of {', '.join(HEAD_INITS)}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}: give a factor above 0 and up to 1; 1 is none")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """This is the configuration of one fine-tuning run.

    source, model: the pre-trained encoder, and the encoder as it is fine-tuned (its own image size, all of its depth);
    known once the checkpoint has been read. classes: names by label, known once the data has been listed; empty if the
    data has numbers alone.
    """

    finetune: FinetuneSection
    source: ModelConfig | None = None
    model: ModelConfig | None = None
    classes: tuple[str, ...] = ()

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

    def resized(self, model: ModelConfig) -> ModelConfig:
        """Return ``model`` at the image size that was asked for, or at its own."""
        section = self.finetune
        if not section.image_height:
            return model
        return dataclasses.replace(model, image_height=section.image_height, image_width=section.image_width)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> FinetuneConfig:
        """Read as `Config.from_dict` does, with the two models and the classes."""
        made = super().from_dict(values, source=source)
        models = {
            name: section_from_dict(ModelConfig, values[name], source=source)
            for name in ("source", "model")
            if values.get(name)
        }
        return dataclasses.replace(made, classes=tuple(values.get("classes", ())), **models)
