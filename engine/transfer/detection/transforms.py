"""Transform a picture and its objects before the detector sees them, as a function of a key and nothing else.

The operations are those of torchvision's transforms v2 on its image, boxes and masks at once. Their random parameters
are drawn here: torchvision's own transforms draw from torch's global generator, which the training step uses meanwhile.

| variant | training                                                          | evaluation                            |
|---------|-------------------------------------------------------------------|---------------------------------------|
| paper   | short side one of 11 from 0.6 of the largest on, flip (480 - 800) | largest short side, long side bounded |
| vitdet  | scale 0.1 - 2 of what fits, crop, flip (large-scale jitter)       | as large as fits                      |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

from mirl.engine.transfer.detection.annotations import Objects
from mirl.engine.transfer.detection.config import SIZES, DetectSection
from mirl.keyed import keyed_uniform

# The first word of a key. Others are in dataloaders/, engine/training/noise.py and transfer/random_state.py; the split
# of pretraining/evaluation_data.py has 14 as well, but no run draws from both.
STREAM = 14
LEAST_SIDE = 1.0  # a box has at least this side after a crop, in pixels


@dataclass
class Sample:
    """A sample is a transformed picture with its objects.

    image: uint8 [C, H, W]. target: "boxes" float32 [n, 4], "labels" int64 [n], "masks" uint8 [n, H, W].
    original: height and width of the picture before it was resized.
    """

    image: Tensor
    target: dict[str, Tensor]
    original: tuple[int, int]


def evaluation_size(variant: str, height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width to which a picture is resized; ``size`` as `DetectConfig.size`."""
    if variant == "vitdet":
        return _scaled(height, width, min(size[0] / height, size[1] / width))
    return by_short_side(height, width, size[0], size[1])


def by_short_side(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the size with short side ``short``, or less if the long side would pass ``long``."""
    return _scaled(height, width, min(short / min(height, width), long / max(height, width)))


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, round(height * scale)), max(1, round(width * scale))


def for_evaluation(pixels: np.ndarray, variant: str, size: tuple[int, int]) -> Tensor:
    """Resize a picture uint8 [H, W, C] to an image uint8 [C, H', W']."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return tf.resize(image, list(evaluation_size(variant, *pixels.shape[:2], size)), antialias=True)


def for_training(
    pixels: np.ndarray,
    objects: Objects,
    section: DetectSection,
    size: tuple[int, int],
    key: tuple[int, int, int],
    *,
    flip: bool = True,
) -> Sample:
    """Make a sample with random size, place and mirroring by ``key``: seed, epoch and place in the epoch's order."""
    draws = [float(keyed_uniform(STREAM, *key, number)[0]) for number in range(4)]
    original = height, width = pixels.shape[:2]
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(objects.boxes), format="XYXY", canvas_size=original)
    masks = tv_tensors.Mask(torch.from_numpy(objects.masks))
    if section.variant == "vitdet":
        low, high = section.jitter
        fitting = min(size[0] / height, size[1] / width)
        shape = _scaled(height, width, fitting * (low + draws[0] * (high - low)))
    else:
        low = section.smallest
        share = low + (1 - low) * int(draws[0] * SIZES) / (SIZES - 1)
        shape = by_short_side(height, width, max(1, round(share * size[0])), size[1])
    parts = [tf.resize(part, list(shape)) for part in (image, boxes, masks)]
    if section.variant == "vitdet":
        crop = tuple(min(side, most) for side, most in zip(shape, size, strict=True))
        top, left = (int(draw * (side - part + 1)) for draw, side, part in zip(draws[1:3], shape, crop, strict=True))
        parts = [tf.crop(part, top, left, *crop) for part in parts]
    if flip and draws[3] < 0.5:
        parts = [tf.horizontal_flip(part) for part in parts]
    return _sanitised(*parts, torch.from_numpy(objects.labels), original)


def _sanitised(image: Tensor, boxes: Tensor, masks: Tensor, labels: Tensor, original: tuple[int, int]) -> Sample:
    """Leave out objects that a crop has cut away, or whose mask is lost in a smaller picture."""
    target = {"boxes": tf.clamp_bounding_boxes(boxes), "labels": labels, "masks": masks}
    target = v2.SanitizeBoundingBoxes(
        min_size=LEAST_SIDE, labels_getter=lambda given: (given["labels"], given["masks"])
    )(target)
    seen = target["masks"].flatten(1).any(dim=1).bool()
    kept = {name: value.as_subclass(Tensor)[seen] for name, value in target.items()}
    return Sample(image=image.as_subclass(Tensor), target=kept | {"boxes": kept["boxes"].float()}, original=original)


def pad_together(images: list[Tensor], least: tuple[int, int], multiple: int) -> Tensor:
    """Put images uint8 [C, h, w] into one batch uint8 [B, H, W, C], with 0 at the bottom and on the right.

    H and W are multiples of ``multiple`` and no smaller than ``least``.
    """
    height, width = (
        -(-max(least[axis], *(image.shape[1 + axis] for image in images)) // multiple) * multiple for axis in (0, 1)
    )
    batch = torch.zeros(len(images), height, width, images[0].shape[0], dtype=torch.uint8)
    for number, image in enumerate(images):
        batch[number, : image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)
    return batch
