"""Find out whether a data set is grey: its images have three channels, and each channel says the same."""

from __future__ import annotations

import numpy as np

from mirl.dataloaders.decoding.arrays import ArrayFormat
from mirl.dataloaders.decoding.headers import decode_with_pillow
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.patience import read_image

SAMPLED = 64
# The channels of a grey pixel may differ by this many levels of 255: a file format that stores luma and chroma rounds.
TOLERANCE = 2


def is_grey(pixels_HWC: np.ndarray) -> bool:
    """Say whether all channels of each pixel are equal; in uint8, up to `TOLERANCE`. False for a single channel."""
    if pixels_HWC.shape[2] < 2:
        return False
    spread_HW = np.ptp(pixels_HWC, axis=2)
    return bool((spread_HW <= (TOLERANCE if pixels_HWC.dtype == np.uint8 else 0)).all())


def all_grey(source: Source, channels: int, array_format: ArrayFormat | None, *, sample: int = SAMPLED) -> bool:
    """Say whether all readable images among ``sample`` of them, spread evenly over ``source``, are grey.

    False if none is readable. The first image in colour ends the search. channels: of an image as it is trained on.
    array_format: see `detect_array_format`.
    """
    if channels < 2:
        return False
    count, seen = min(sample, source.num_images), 0
    for index in (number * source.num_images // count for number in range(count)):
        try:
            data = read_image(source, index)
            pixels_HWC = decode_with_pillow(data, channels) if array_format is None else array_format.read(data)
        except ImageError:
            continue  # the loader names the image when its turn comes
        if not is_grey(pixels_HWC):
            return False
        seen += 1
    return seen > 0
