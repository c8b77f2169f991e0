"""Describe a data set: its classes, the sizes and channels of its images, the mean and deviation of its values.

Only images that can be decoded count. Mean and deviation give each image the same weight, as training does.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mirl.dataloaders.greyness import is_grey
from mirl.dataloaders.sources.paths import shown

CLASSES_SHOWN = 30
# A class is small if it has less than this share of the images of the median class.
SMALL = 0.1
_ROWS_AT_ONCE = 2**20  # so many pixels are turned into floats at a time


@dataclass(frozen=True, slots=True)
class Look:
    """A look describes one decoded image.

    mean, square: of its values and of their squares, by channel, in [0, 1] if they are integers. mode: Pillow's name of
    the stored kind, or the type of number of an array. pages: how many the file has; the first is the image.
    """

    height: int
    width: int
    mode: str
    grey: bool
    mean: tuple[float, ...]
    square: tuple[float, ...]
    pages: int = 1


def look_at(pixels_HWC: np.ndarray, mode: str, pages: int = 1) -> Look:
    """Describe an image as training has it, uint8, uint16 or float32."""
    height, width, channels = pixels_HWC.shape
    rows_NC = pixels_HWC.reshape(-1, channels)
    sums = np.zeros((2, channels))
    for first in range(0, len(rows_NC), _ROWS_AT_ONCE):
        values_NC = rows_NC[first : first + _ROWS_AT_ONCE].astype(np.float64)
        sums += values_NC.sum(axis=0), np.square(values_NC).sum(axis=0)
    scale = np.iinfo(pixels_HWC.dtype).max if np.issubdtype(pixels_HWC.dtype, np.integer) else 1
    mean_C, square_C = sums[0] / scale / len(rows_NC), sums[1] / scale**2 / len(rows_NC)
    return Look(height, width, mode, is_grey(pixels_HWC), tuple(mean_C.tolist()), tuple(square_C.tolist()), pages)


def picture_form(data: bytes) -> tuple[str, int]:
    """Return Pillow's name of the stored kind of a picture (RGB, L, CMYK, ...), and its number of pages or frames."""
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
        try:
            # A JPEG of several pictures (MPO) holds one image and previews, or another view of it.
            return mode, getattr(image, "n_frames", 1) if image.format not in ("JPEG", "MPO") else 1
        except Exception:  # the file is damaged behind the first page
            return mode, 1


@dataclass(frozen=True, kw_only=True)
class Overview:
    """An overview describes one folder, list or split.

    counts: images of each class in the order of the labels, None without labels. unlabelled: images whose class number
    cannot be used, in a set that has labels. heights, widths: least, median and greatest, in upright pixels. modes: how
    many images of each mode. grey: how many images have several channels with one value in all of them. paged, unused:
    files of several pages or frames, and pages that are no image. mean, std: by channel; empty if no image is good.
    """

    name: str
    images: int
    counts: dict[str, int] | None
    unlabelled: int
    heights: tuple[float, float, float]
    widths: tuple[float, float, float]
    modes: dict[str, int]
    grey: int
    paged: int
    unused: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls, name: str, looks: Sequence[Look], labels: Iterable[int] | None, classes: Sequence[str] | None
    ) -> Overview:
        """Make an overview of the good images.

        labels: one for each of ``looks``, -1 for an image without one. classes: names of all labels, also of those that
        no good image has.
        """
        labels = None if labels is None else list(labels)
        mean_C = np.mean([look.mean for look in looks], axis=0) if looks else np.empty(0)
        square_C = np.mean([look.square for look in looks], axis=0) if looks else np.empty(0)
        return cls(
            name=name,
            images=len(looks),
            counts=None if labels is None else _counts(labels, classes),
            unlabelled=0 if labels is None else labels.count(-1),
            heights=_spread([look.height for look in looks]),
            widths=_spread([look.width for look in looks]),
            modes=dict(Counter(look.mode for look in looks).most_common()),
            grey=sum(look.grey for look in looks),
            paged=sum(look.pages > 1 for look in looks),
            unused=sum(look.pages - 1 for look in looks),
            mean=tuple(mean_C.tolist()),
            std=tuple(np.sqrt(np.maximum(square_C - mean_C**2, 0)).tolist()),
        )

    @property
    def small_classes(self) -> dict[str, int]:
        """Return the classes with far fewer images than the median class, or none, and how many they have."""
        counts = self.counts or {}
        middle = float(np.median(list(counts.values()))) if counts else 0.0
        return {name: count for name, count in counts.items() if count < SMALL * middle or not count}

    def lines(self) -> list[str]:
        """Return a line each on classes, sizes, channels and statistics, and one for each warning."""
        if not self.images:
            return []
        lines = self._lines_of_classes()
        if self.unlabelled:
            lines.append(
                f"warning: {self.unlabelled} of {self.images} images have no class number that can be used (their cls "
                "parts); training without labels takes them, fine-tuning calls them broken"
            )
        height, width = (" / ".join(f"{value:g}" for value in values) for values in (self.heights, self.widths))
        lines.append(f"height {height}, width {width} pixels (least / median / greatest)")
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items())
        several = len(self.mean) > 1
        grey = f"; {'all' if self.grey == self.images else self.grey} of them grey" if several and self.grey else ""
        lines.append(f"stored as {modes}{grey}; used with {len(self.mean)} channel{'s' if several else ''}")
        if self.paged:
            lines.append(
                f"warning: {self.paged} of the files have several pages or frames, of which the first is the image: "
                f"{self.unused} pages are not used; write each into a file of its own to use them"
            )
        return [f"{self.name}: {line}" if self.name else line for line in [*lines, *self._lines_of_statistics()]]

    def _lines_of_classes(self) -> list[str]:
        if not self.counts:
            return ["classes: none (images in class folders, or a list with labels, have them)"]
        counts = {shown(name): count for name, count in self.counts.items()}
        ordered = sorted(counts, key=lambda name: (counts[name], name))
        smallest, largest = ordered[0], ordered[-1]
        line = f"classes {len(counts)}"
        if len(counts) <= CLASSES_SHOWN:
            line += ": " + ", ".join(f"{name} {count}" for name, count in counts.items())
        middle = float(np.median(list(counts.values())))
        if counts[smallest] < counts[largest]:
            line += f"; smallest {smallest} ({counts[smallest]}), largest {largest} ({counts[largest]})"
            line += f", median {middle:g}"
        elif len(counts) > CLASSES_SHOWN:
            line += f", {middle:g} images each"
        lines = [line]
        if small := self.small_classes:
            some = ", ".join(f"{shown(name)} ({count})" for name, count in list(small.items())[:5])
            more = f" and {len(small) - 5} more" if len(small) > 5 else ""
            lines.append(
                f"warning: few images of class {some}{more}, less than a tenth of the median class ({middle:g}): their "
                "accuracy will be low and hardly shows in top-1; add images, or leave the class out"
            )
        return lines

    def _lines_of_statistics(self) -> list[str]:
        if self.grey == self.images and len(self.mean) > 1:
            one_mean = sum(self.mean) / len(self.mean)
            one_std = math.sqrt(sum(value**2 for value in self.std) / len(self.std))
            flags = _flags((one_mean,) * len(self.mean), (one_std,) * len(self.std))
            return [
                f"mean and std of these grey images, one for all channels: {flags} (pretrain by itself takes "
                "ImageNet's, one for all channels too)"
            ]
        return [f"mean and std of these images: {_flags(self.mean, self.std)}"]


def _counts(labels: Iterable[int], classes: Sequence[str] | None) -> dict[str, int]:
    found = Counter(labels)
    found.pop(-1, None)
    if classes is None:
        return {str(label): found[label] for label in sorted(found)}
    return {name: found[label] for label, name in enumerate(classes)}


def _spread(values: Sequence[int]) -> tuple[float, float, float]:
    return (min(values), float(np.median(values)), max(values)) if values else (0, 0, 0)


def _flags(mean: Sequence[float], std: Sequence[float]) -> str:
    """Write mean and deviation as flags. A deviation is at least one level, 1 / 255: a set of one flat colour has 0."""
    means, stds = (" ".join(f"{value:.4g}" for value in values) for values in (mean, [max(s, 1 / 255) for s in std]))
    return f"--mean {means} --std {stds}"
