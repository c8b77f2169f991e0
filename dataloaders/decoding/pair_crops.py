"""Augment an image and its label image alike: scale, crop and mirror both, and change the colours of the image alone.

The steps are mmsegmentation's RandomResize, RandomCrop with cat_max_ratio, RandomFlip and PhotoMetricDistortion. Every
random number is a function of (seed, epoch, position). H W the crop, h w the image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mirl.dataloaders.sources.label_map import IGNORED
from mirl.keyed import keyed_uniform

_PAIR_STREAM = 5  # first word of a key; dataloaders/order.py, decoding/crops.py and decoding/samples.py have others
ATTEMPTS = 10
LONGEST = 4  # the longer side, in shorter sides of the crop: 2048 x 512 in mmsegmentation
_SCALE, _MIRROR, _COLOUR, _PLACES = 0, 1, 2, 12
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, 0.5, 0.5, 18 / 180


@dataclass(frozen=True, kw_only=True)
class PairAugmentation:
    """These are the settings of the augmentation; calling it augments an image and its label image.

    size: (H, W) of the crop. scale: the image is resized until its shorter side is the crop's shorter side times a
    number drawn between these two. cat_max_ratio: a crop is drawn again if one class has at least this share of its
    labelled pixels. flip: mirror half of the images. photometric: change the colours (`distort`). mean: a value in
    [0, 1] for each channel, which fills the crop beside a smaller image.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: bool = True
    photometric: bool = True
    mean: Sequence[float] = (0.5, 0.5, 0.5)

    def __call__(
        self, image_hwC: np.ndarray, labels_hw: np.ndarray, seed: int, epoch: int, position: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Map uint8 [h, w, C] and int16 [h, w] to uint8 [H, W, C] and int16 [H, W], IGNORED beside the image."""
        u = keyed_uniform(_PAIR_STREAM, seed, epoch, position, np.arange(_PLACES + 2 * ATTEMPTS))
        factor = self._factor(labels_hw.shape, u[_SCALE])
        places = u[_PLACES:].reshape(ATTEMPTS, 2)
        window, labels = self._crop(labels_hw, factor, places)
        image = _resized_window(image_hwC, factor, window)
        if self.flip and u[_MIRROR] < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if self.photometric:
            image = distort(image, u[_COLOUR:_PLACES])
        return self._pad(image, labels)

    def _factor(self, size: tuple[int, ...], u: float) -> float:
        low, high = self.scale
        short = min(self.size) * (low + (high - low) * u)
        return min(short / min(size), LONGEST * short / max(size))

    def _crop(
        self, labels_hw: np.ndarray, factor: float, places: np.ndarray
    ) -> tuple[tuple[int, int, int, int], np.ndarray]:
        """Return a window (top, left, height, width) of the resized image, and its labels.

        It is the first one drawn that has several classes, none of them with too large a share, else the last one.
        """
        rows, columns = (_nearest(side, factor) for side in labels_hw.shape)
        height, width = min(self.size[0], len(rows)), min(self.size[1], len(columns))
        window, labels = (0, 0, height, width), labels_hw[:0]
        for down, across in places:
            top = int(down * (len(rows) - height + 1))
            left = int(across * (len(columns) - width + 1))
            window = (top, left, height, width)
            labels = labels_hw[rows[top : top + height, None], columns[None, left : left + width]]
            if self.cat_max_ratio >= 1 or _is_varied(labels, self.cat_max_ratio):
                break
        return window, labels

    def _pad(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = labels.shape
        if (height, width) == self.size:
            return np.ascontiguousarray(image), np.ascontiguousarray(labels)
        channels = image.shape[2]
        filled = np.empty((*self.size, channels), np.uint8)
        filled[:] = np.rint(255 * np.asarray(self.mean)[:channels])
        beside = np.full(self.size, IGNORED, np.int16)
        filled[:height, :width], beside[:height, :width] = image, labels
        return filled, beside


def _nearest(side: int, factor: float) -> np.ndarray:
    """Return the nearest source index, by the centres of pixels, for each place of a side resized by ``factor``."""
    count = max(1, round(side * factor))
    return np.minimum(((np.arange(count) + 0.5) * (side / count)).astype(np.int64), side - 1)


def _is_varied(labels: np.ndarray, most: float) -> bool:
    counts = np.bincount(labels.ravel().astype(np.int64) - IGNORED)[1:]  # without the ignored pixels
    counts = counts[counts > 0]
    return len(counts) > 1 and counts.max() < most * counts.sum()


def _resized_window(image_hwC: np.ndarray, factor: float, window: tuple[int, int, int, int]) -> np.ndarray:
    """Resize ``window`` of the resized image alone, without the rest: bilinear, smoothed if it gets smaller."""
    top, left, height, width = window
    down, across = (side / max(1, round(side * factor)) for side in image_hwC.shape[:2])
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    # Rounding must not lead out of the image.
    box = (box[0], box[1], min(box[2], image_hwC.shape[1]), min(box[3], image_hwC.shape[0]))
    grey = image_hwC.shape[2] == 1
    picture = Image.fromarray(image_hwC[..., 0] if grey else image_hwC)
    found = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return found[..., None] if grey else found


def distort(image: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each in half of the images.

    Brightness comes first; contrast comes before or after saturation and hue. Only images of three channels get
    saturation and hue. u: 10 uniform numbers.
    """
    bright, contrast, saturate, hue = u[0] < 0.5, u[2] < 0.5, u[4] < 0.5, u[6] < 0.5
    first = u[8] < 0.5
    values = image.astype(np.float32)
    if bright:
        values += _BRIGHTNESS * (2 * u[1] - 1)
    gain = 1 + _CONTRAST * (2 * u[3] - 1)
    if contrast and first:
        values *= gain
    if image.shape[2] == 3 and (saturate or hue):
        pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        hsv = np.asarray(Image.fromarray(pixels).convert("HSV")).astype(np.float32)
        if saturate:
            hsv[..., 1] = np.clip(hsv[..., 1] * (1 + _SATURATION * (2 * u[5] - 1)), 0, 255)
        if hue:
            hsv[..., 0] = (hsv[..., 0] + 256 * _HUE * (2 * u[7] - 1)) % 256
        turned = Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB")
        values = np.asarray(turned).astype(np.float32)
    if contrast and not first:
        values *= gain
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
