"""Score a segmentation by one table of counts: mIoU, mAcc and aAcc, and IoU of each class.

The table counts pixels of class i (rows) that were taken for class j (columns), over all images together, as integers.
So the scores are exact on any number of ranks. Means are over the classes with a score, as in mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SegmentScores:
    """The scores follow from ``confusion``, pixels by true class and predicted class.

    images: the images that were looked at. broken: the images that could not be.
    """

    confusion: list[list[int]]
    images: int
    broken: int = 0

    def iou_percent(self) -> list[float | None]:
        """Return for each class its pixels that were called so, as a share of those that are or were called so.

        None for a class that is in no image and was seen in none.
        """
        called = [sum(column) for column in zip(*self.confusion, strict=True)]
        return [_percent(row[index], sum(row) + called[index] - row[index]) for index, row in enumerate(self.confusion)]

    def accuracy_percent(self) -> list[float | None]:
        """Return for each class the share of its pixels that was called so. None for a class that is in no image."""
        return [_percent(row[index], sum(row)) for index, row in enumerate(self.confusion)]

    @property
    def miou_percent(self) -> float:
        return _mean(self.iou_percent())

    @property
    def macc_percent(self) -> float:
        return _mean(self.accuracy_percent())

    @property
    def aacc_percent(self) -> float:
        """Return the share of rightly called pixels among all pixels that have a class."""
        right = sum(row[index] for index, row in enumerate(self.confusion))
        return _percent(right, sum(map(sum, self.confusion))) or 0.0

    def metrics(self, prefix: str = "val_") -> dict[str, float]:
        """Return the values for a log."""
        values = {"miou_percent": self.miou_percent, "macc_percent": self.macc_percent,
                  "aacc_percent": self.aacc_percent, "images": self.images}  # fmt: skip
        return {prefix + name: value for name, value in values.items()}

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
        """Return IoU, accuracy and pixels of each class by its name."""
        rows = zip(names, self.iou_percent(), self.accuracy_percent(), map(sum, self.confusion), strict=True)
        return {
            name: {"iou_percent": iou, "accuracy_percent": accuracy, "pixels": pixels}
            for name, iou, accuracy, pixels in rows
        }

    def table(self, names: Sequence[str]) -> list[str]:
        """Return lines for people, the best class first."""
        found = sorted(self.by_class(names).items(), key=lambda item: -(item[1]["iou_percent"] or 0.0))
        width = max(map(len, names))
        return [
            f"{name:<{width}}  IoU {_shown(row['iou_percent'])}  accuracy {_shown(row['accuracy_percent'])}  "
            f"{row['pixels']:>12,} pixels"
            for name, row in found
        ]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _shown(value: float | int | None) -> str:
    return "     -" if value is None else f"{value:6.2f}"
