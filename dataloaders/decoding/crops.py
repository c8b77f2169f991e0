"""Decide which window of an image is taken, whether it is mirrored, and which part evaluation sees.

Windows and mirroring are drawn here, on the host, from the keyed numbers of a sample. Decoders and resizers only carry
them out. An image with a label image is augmented in pair_crops.py. Sizes are those of the upright image, after its
EXIF orientation (see headers.py). B batch; a window is (top, left, height, width) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mirl.errors import UserError
from mirl.keyed import keyed_uniform

ATTEMPTS = 10
_CROP_STREAM = 2
_CENTRE_STREAM = 4
_LONGEST_WHOLE = 16  # an image up to this many times as long as wide is resized as a whole
_SPARE_SQUARES = 2  # the kernel reaches two source pixels when it enlarges, two output pixels when it shrinks
_TOP, _LEFT, _FLIP = 2 * ATTEMPTS, 2 * ATTEMPTS + 1, 2 * ATTEMPTS + 2


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentation is RandomResizedCrop and horizontal flip, as torchvision's transforms of those names do them.

    image_size: output (height, width) in pixels. scale: range of the crop's share of the image's area. ratio: range of
    the crop's width / height, drawn uniformly in the logarithm. flip: mirror half of the images. centred: share of the
    samples that are neither cropped at random nor mirrored, but shown as in evaluation (`centre_windows`).
    """

    image_size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    centred: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.centred <= 1:
            raise UserError(f"centred is {self.centred}, must be a share from 0 to 1")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"image_size is {self.image_size}, must be (height, width), both at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale is {self.scale}, must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio is {self.ratio}, must be (low, high) with 0 < low <= high")

    def windows(
        self, sizes_B2: np.ndarray, seed: int, epoch: int, positions_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (windows int32 [B, 4], mirrored bool [B]) of the samples at `positions_B` of an epoch.

        sizes_B2: (height, width) of each upright image.
        """
        u_BK = keyed_uniform(_CROP_STREAM, seed, epoch, positions_B[:, None], np.arange(_FLIP + 1)[None, :])
        windows_B4 = random_windows(sizes_B2, u_BK, self.scale, self.ratio)
        mirrored_B = u_BK[:, _FLIP] < 0.5 if self.flip else np.zeros(len(positions_B), dtype=bool)
        if self.centred:
            centred_B = keyed_uniform(_CENTRE_STREAM, seed, epoch, positions_B) < self.centred
            windows_B4 = np.where(centred_B[:, None], centre_windows(sizes_B2, self.image_size), windows_B4)
            mirrored_B = mirrored_B & ~centred_B
        return windows_B4, mirrored_B


def centre_windows(sizes_B2: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return the part of each image that `evaluation_crop` leaves, as windows of whole source pixels, int32 [B, 4]."""
    crop = evaluation_crop(image_size)
    height_B, width_B = sizes_B2[:, 0].astype(np.float64), sizes_B2[:, 1].astype(np.float64)
    # Output pixels per source pixel, if the image is resized until it just covers crop.resized.
    scale_B = np.maximum(crop.resized[0] / height_B, crop.resized[1] / width_B)
    h_B = np.clip(np.rint(image_size[0] / scale_B), 1, height_B)
    w_B = np.clip(np.rint(image_size[1] / scale_B), 1, width_B)
    return np.stack([(height_B - h_B) // 2, (width_B - w_B) // 2, h_B, w_B], axis=1).astype(np.int32)


def random_windows(
    sizes_B2: np.ndarray, u_BK: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Compute RandomResizedCrop's windows from uniform numbers: int32 [B, 4].

    There are ten attempts: area share from `scale`, aspect ratio log-uniform in `ratio`, sides rounded half to even.
    The first that fits is placed uniformly. If none fits, the window is the largest centred one whose aspect ratio lies
    within `ratio`. u_BK holds areas in columns 0-9, ratios in 10-19, then top and left.
    """
    height_B1, width_B1 = sizes_B2[:, :1].astype(np.float64), sizes_B2[:, 1:].astype(np.float64)
    area_BA = height_B1 * width_B1 * (scale[0] + (scale[1] - scale[0]) * u_BK[:, :ATTEMPTS])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect_BA = np.exp(low + (high - low) * u_BK[:, ATTEMPTS : 2 * ATTEMPTS])
    w_BA = np.rint(np.sqrt(area_BA * aspect_BA))
    h_BA = np.rint(np.sqrt(area_BA / aspect_BA))
    fits_BA = (w_BA > 0) & (w_BA <= width_B1) & (h_BA > 0) & (h_BA <= height_B1)

    rows_B, first_B = np.arange(len(sizes_B2)), fits_BA.argmax(axis=1)
    height_B, width_B = height_B1[:, 0], width_B1[:, 0]
    h_B, w_B = h_BA[rows_B, first_B], w_BA[rows_B, first_B]
    top_B = np.floor(u_BK[:, _TOP] * (height_B - h_B + 1))
    left_B = np.floor(u_BK[:, _LEFT] * (width_B - w_B + 1))

    none_B = ~fits_BA.any(axis=1)
    if none_B.any():
        # A one-pixel-high strip would round to a width or height of 0, which torchvision lets through; 1 is the least.
        wide_B, tall_B = width_B / height_B > ratio[1], width_B / height_B < ratio[0]
        h_fall_B = np.where(tall_B, np.clip(np.rint(width_B / ratio[0]), 1, height_B), height_B)
        w_fall_B = np.where(wide_B, np.clip(np.rint(height_B * ratio[1]), 1, width_B), width_B)
        h_B, w_B = np.where(none_B, h_fall_B, h_B), np.where(none_B, w_fall_B, w_B)
        top_B = np.where(none_B, (height_B - h_B) // 2, top_B)
        left_B = np.where(none_B, (width_B - w_B) // 2, left_B)
    return np.stack([top_B, left_B, h_B, w_B], axis=1).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class EvaluationCrop:
    """Evaluation sees this part of an image, both here and by the configurations of exported models.

    The image is resized, its proportions kept, until it just covers ``resized`` (height, width) pixels. Then its centre
    of ``image_size`` is taken. share: the part of each side of ``resized`` that is taken; timm's crop_pct.
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    share: float

    def __str__(self) -> str:
        height, width = self.image_size
        reached = (
            f"the short side is {min(self.resized)} pixels"
            if height == width
            else f"it covers {self.resized[0]}x{self.resized[1]} pixels"
        )
        return f"resized until {reached} (bicubic), of which the central {height}x{width} are seen"


def evaluation_crop(image_size: tuple[int, int]) -> EvaluationCrop:
    """Return the conventional crop: 224 of 256 pixels of the shorter side, rounded to whole pixels."""
    shorter = min(image_size)
    short, share = round(shorter * 256 / 224), 224 / 256
    if int(shorter / share) != short:  # timm rounds down: take a share that gives timm the same whole pixels
        share = shorter / (short + 0.5)
    height, width = image_size
    return EvaluationCrop(image_size=image_size, resized=(int(height / share), int(width / share)), share=share)


def evaluation_windows(
    sizes_B2: np.ndarray, resize_short: int, image_size: tuple[int, int], cover: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Plan Resize(short side) and CenterCrop as torchvision does them.

    Returns windows int32 [B, 4], mirrored (never) bool [B], resized sizes int32 [B, 2], (top, left) of the crop in
    the resized image int32 [B, 2]. The long side is floor(resize_short * long / short); offsets are rounded half to
    even. If the resized image would not cover ``cover`` (height, width; default: the crop), the short side grows until
    it does. torchvision would pad a wide crop of a tall image with black.

    The window is the whole image, except for strips: an image of 60000 x 1 pixels, resized as a whole, would take
    gigabytes for a crop of its centre. From an image more than 16 times as long as wide only the squares (of its short
    side) around the crop are taken, with more to spare than the bicubic kernel reaches.
    """
    height_B, width_B = sizes_B2[:, 0].astype(np.int64), sizes_B2[:, 1].astype(np.int64)
    lesser_B, greater_B = np.minimum(height_B, width_B), np.maximum(height_B, width_B)
    cover = cover or image_size
    covering_B = np.maximum(-(-cover[0] * lesser_B // height_B), -(-cover[1] * lesser_B // width_B))
    short_B = np.maximum(resize_short, covering_B)
    long_B = short_B * greater_B // lesser_B
    portrait_B1 = (height_B > width_B)[:, None]
    resized_B2 = np.where(portrait_B1, np.stack([long_B, short_B], 1), np.stack([short_B, long_B], 1))
    offset_B2 = np.rint((resized_B2 - np.asarray(image_size)) / 2.0)
    windows_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1).astype(np.int64)
    for i in np.flatnonzero(greater_B > _LONGEST_WHOLE * lesser_B):
        axis, side, short = int(width_B[i] > height_B[i]), int(lesser_B[i]), int(short_B[i])
        first = max(0, int(offset_B2[i, axis]) // short - _SPARE_SQUARES)
        squares = -(-image_size[axis] // short) + 1 + 2 * _SPARE_SQUARES
        if (first + squares) * side <= greater_B[i]:
            windows_B4[i, axis], windows_B4[i, 2 + axis] = first * side, squares * side
            resized_B2[i, axis] = squares * short
            offset_B2[i, axis] -= first * short
    mirrored_B = np.zeros(len(sizes_B2), dtype=bool)
    return windows_B4.astype(np.int32), mirrored_B, resized_B2.astype(np.int32), offset_B2.astype(np.int32)
