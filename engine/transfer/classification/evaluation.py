"""Measure top-1, top-5 and loss on a labelled set: sums over all images of all ranks, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mirl.dataloaders import EvalLoader
from mirl.engine.transfer.classification.classes import require_same_classes

__all__ = [
    "EvaluationInterrupted",
    "ClassScores",
    "Scores",
    "evaluate",
    "evaluate_by_class",
    "hits",
    "require_same_classes",
]

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores are counts of images; ``loss`` is their mean cross-entropy."""

    images: int
    correct: int
    correct_in_5: int
    loss: float

    @property
    def top1_percent(self) -> float:
        return 100 * self.correct / max(1, self.images)

    @property
    def top5_percent(self) -> float:
        """Return how often the label is among the 5 largest logits, or among all if there are fewer classes."""
        return 100 * self.correct_in_5 / max(1, self.images)

    def metrics(self, prefix: str = "val_") -> dict[str, float]:
        """Return the values for a log."""
        values = {"loss": self.loss, "top1_percent": self.top1_percent, "top5_percent": self.top5_percent}
        return {prefix + name: value for name, value in values.items()} | {prefix + "images": self.images}


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """A whole set and each of its classes have scores.

    confusion: images of class i (rows) that were taken for class j (columns). correct_in_5: by class.
    """

    total: Scores
    confusion: list[list[int]]
    correct_in_5: list[int]

    def of_classes(self) -> list[dict[str, int | float | None]]:
        """Return for each class its images, how many were found (recall), and how many named so are right (precision).

        A share without a divisor is None: for a class without images, or one that no image was taken for.
        """
        named = [sum(column) for column in zip(*self.confusion, strict=True)]
        found = []
        for label, row in enumerate(self.confusion):
            images, correct = sum(row), row[label]
            found.append(
                {
                    "images": images, "correct": correct, "predicted": named[label],
                    "correct_in_5": self.correct_in_5[label],
                    "recall_percent": 100 * correct / images if images else None,
                    "precision_percent": 100 * correct / named[label] if named[label] else None,
                }
            )  # fmt: skip
        return found


class EvaluationInterrupted(Exception):
    """The run is to end; there are no scores."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, device: torch.device, interrupted: Callable[[], bool] | None = None
) -> Scores:
    """Score ``model`` (images -> logits) in eval mode, with the same result on every rank of the process group, if any.

    ``loader`` is of this rank; padding and broken images, which it marks, are in no count. Counts are exact on every
    number of ranks and batch size; the loss differs by the order of a float64 sum.

    Raises:
        EvaluationInterrupted: ``interrupted``, asked before every batch, said so.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with closing(_judged(model, loader, device, interrupted)) as judged:
        for _, _, valid_B, columns in judged:
            sums += _sum_valid(columns, valid_B)
    return _scores(sums)


@torch.no_grad()
def evaluate_by_class(model: nn.Module, loader: EvalLoader, device: torch.device, num_classes: int) -> ClassScores:
    """Score as `evaluate` does, and count which class was taken for which. Labels must be below ``num_classes``."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    confusion_CC = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    in_5_C = torch.zeros(num_classes, dtype=torch.int64, device=device)
    with closing(_judged(model, loader, device, None)) as judged:
        for logits, labels_B, valid_B, columns in judged:
            sums += _sum_valid(columns, valid_B)
            pairs_B = labels_B * num_classes + logits.argmax(dim=1)
            confusion_CC += torch.bincount(pairs_B[valid_B], minlength=num_classes**2).view_as(confusion_CC)
            in_5_C += torch.bincount(labels_B[valid_B & columns[2]], minlength=num_classes)
    if torch.distributed.is_initialized():
        for counts in (confusion_CC, in_5_C):
            torch.distributed.all_reduce(counts)
    return ClassScores(total=_scores(sums), confusion=confusion_CC.tolist(), correct_in_5=in_5_C.tolist())


Judged = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]


def _judged(
    model: nn.Module, loader: EvalLoader, device: torch.device, interrupted: Callable[[], bool] | None
) -> Iterator[Judged]:
    """Yield of each batch logits [B, C], labels [B], a mask of the images that count [B], and four columns [B].

    The columns are one, whether the image is right, whether it is right among the first five, and its loss. ``model``
    is in eval mode meanwhile.
    """
    training = model.training
    model.eval()
    try:
        for batch in loader:
            if interrupted is not None and interrupted():
                raise EvaluationInterrupted
            logits = model(batch.images)
            valid_B = torch.from_numpy(batch.valid).to(device)
            loss_B = F.cross_entropy(logits.float(), batch.labels, reduction="none")
            hits_BT = hits(logits, batch.labels)
            yield logits, batch.labels, valid_B, (torch.ones_like(loss_B), hits_BT[:, 0], hits_BT.any(dim=1), loss_B)
    finally:
        model.train(training)


def _sum_valid(columns: tuple[torch.Tensor, ...], valid_B: torch.Tensor) -> torch.Tensor:
    # torch.where and not a product, because the values of padding may be NaN.
    return torch.stack([torch.where(valid_B, column, 0).sum(dtype=torch.float64) for column in columns])


def _scores(sums: torch.Tensor) -> Scores:
    """Add the sums of one rank up over all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    images, correct, correct_in_5, loss = sums.tolist()
    return Scores(
        images=int(images), correct=int(correct), correct_in_5=int(correct_in_5), loss=loss / max(1.0, images)
    )


def hits(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Return bool [B, T]: whether the t-th largest logit is the label's, T = min(5, C)."""
    best_BT = logits_BC.topk(min(TOP, logits_BC.shape[1]), dim=1).indices
    return best_BT == labels_B[:, None]
