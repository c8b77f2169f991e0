"""Whether a data set is grey: its images have three channels and nothing in them that one would not say."""

from __future__ import annotations

import numpy as np

from mirl.dataloaders.decoding.arrays import ArrayFormat
from mirl.dataloaders.decoding.headers import decode_with_pillow
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.patience import read_image

SAMPLED = 64
# Levels of 255 between the channels of a grey pixel: what a file format that stores luma and chroma may leave.
TOLERANCE = 2


def is_grey(pixels_HWC: np.ndarray) -> bool:
    """Whether all channels of each pixel are equal; in uint8, up to `TOLERANCE`. False for a single channel."""
    if pixels_HWC.shape[2] < 2:
        return False
    spread_HW = np.ptp(pixels_HWC, axis=2)
    return bool((spread_HW <= (TOLERANCE if pixels_HWC.dtype == np.uint8 else 0)).all())


def all_grey(source: Source, channels: int, array_format: ArrayFormat | None, *, sample: int = SAMPLED) -> bool:
    """Whether every readable one of ``sample`` images, spread evenly over ``source``, is grey; False if there is none.

    It ends at the first image in colour. channels: of an image as it is trained on. array_format: see
    `detect_array_format`.
    """
    if channels < 2:
        return False
    count, seen = min(sample, source.num_images), 0
    for index in (number * source.num_images // count for number in range(count)):
        try:
            data = read_image(source, index)
            pixels_HWC = decode_with_pillow(data, channels) if array_format is None else array_format.read(data)
        except ImageError:
            continue  # told by the loader, when its turn comes
        if not is_grey(pixels_HWC):
            return False
        seen += 1
    return seen > 0
