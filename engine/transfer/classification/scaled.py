"""A recipe can leave the strength of regularisation to the length of the run and the size of the images.

| epochs            | strength s          | why                                                             |
|-------------------|---------------------|-----------------------------------------------------------------|
| up to `MILD`      | 0                   | measured at 6 (benchmarks/LOG.md): 1 cost 13 points of top-1    |
| `MILD` .. `FULL`  | rises linearly to 1 | a straight line between the two, not measured                   |
| `FULL` and longer | 1                   | MAE fine-tunes its ViT-B for 100 epochs with the values below   |

| setting         | at strength s                                                                    |
|-----------------|----------------------------------------------------------------------------------|
| drop_path       | 0.1 s                                                                            |
| mixup, cutmix   | alpha 0.8 s and 1.0 s                                                            |
| label_smoothing | 0.1 s                                                                            |
| random_erase    | probability 0.25 s                                                               |
| rand_augment    | each operator with probability 0.5 s, timm's being 0.5; off at 0                 |
| crop_scale      | from 0.6 - 0.4 s of the area, but never fewer than `SIDE` x `SIDE` pixels, to 1  |

``centre_crops`` is scaled too, the share of images that are shown as in evaluation: 1 at no epochs, 0 from `VARIED` on.
The features of a briefly pre-trained encoder depend on the place of a thing in the image. To learn otherwise takes more
passes than a short run has: without centred crops 6 epochs cost 2.6 points (benchmarks/LOG.md).

The average of the weights needs no such rule: its decay rises with the steps taken (`ShardedEma`), so that it looks
back at most a ninth of the run so far. The warm-up is a share of the run in itself (``warmup_share``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mirl.engine.transfer.classification.config import OFF, RAND_AUGMENT, FinetuneConfig, FinetuneSection

MILD, FULL = 20, 100
VARIED = 40
SIDE = 32
LARGEST_FLOOR = 0.6  # images of hardly more than SIDE pixels are still cropped


@dataclass(frozen=True, kw_only=True)
class Regularisation:
    """These are the scaled settings of a section, once none is open."""

    drop_path: float
    rand_augment: str
    random_erase: float
    mixup: float
    cutmix: float
    label_smoothing: float


def is_open(config: FinetuneConfig) -> bool:
    """Say whether a setting is still left to `settle`."""
    return None in (config.data.crop_scale, config.data.centre_crops) or any(
        getattr(config.finetune, item.name) is None for item in dataclasses.fields(Regularisation)
    )


def settle(config: FinetuneConfig, *, images: int, side: int) -> FinetuneConfig:
    """Return ``config`` with a value for each setting that was left open; given values stay.

    images: size of the training set, which turns steps into epochs. side: the shorter one of the images, in pixels.
    """
    optim, section = config.optim, config.finetune
    epochs = optim.epochs or optim.steps * optim.batch_size / images
    strength = strength_of(epochs)
    values = {
        "drop_path": 0.1 * strength,
        "rand_augment": f"{RAND_AUGMENT}-p{0.5 * strength:.3f}" if strength else OFF,
        "random_erase": 0.25 * strength,
        "mixup": 0.8 * strength,
        "cutmix": 1.0 * strength,
        "label_smoothing": 0.1 * strength,
    }
    if strength == 1:
        values["rand_augment"] = RAND_AUGMENT
    values = {name: value for name, value in values.items() if getattr(section, name) is None}
    crop_scale = config.data.crop_scale
    if crop_scale is None:
        floor = min(LARGEST_FLOOR, (SIDE / side) ** 2)
        crop_scale = (max(floor, 0.6 - 0.4 * strength), 1.0)
    centre_crops = config.data.centre_crops
    if centre_crops is None:
        centre_crops = max(0.0, 1 - epochs / VARIED)
    return dataclasses.replace(
        config,
        finetune=dataclasses.replace(section, **values),
        data=dataclasses.replace(config.data, crop_scale=crop_scale, centre_crops=centre_crops),
    )


def strength_of(epochs: float) -> float:
    """Return the share of the full regularisation, from 0 to 1, for a run of ``epochs`` passes over its images."""
    return min(1.0, max(0.0, (epochs - MILD) / (FULL - MILD)))


def regularisation(section: FinetuneSection) -> Regularisation:
    """Return the settled values of ``section``."""
    values = {item.name: getattr(section, item.name) for item in dataclasses.fields(Regularisation)}
    assert None not in values.values(), "a scaled setting was not resolved"
    return Regularisation(**values)
