"""Counts are those of a count by hand; padding is in none of them. (On several ranks: test_ranks.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirl.dataloaders import Batch
from mirl.engine.transfer.classification.evaluation import evaluate, hits, require_same_classes
from mirl.errors import UserError

CPU = torch.device("cpu")


class Table(nn.Module):
    """Images are numbers of rows of a table of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.modes: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.modes.add(self.training)
        return self.logits[images]


def batches(labels: torch.Tensor, size: int) -> list[Batch]:
    """Padded by the last row, as the loader does."""
    made = []
    for first in range(0, len(labels), size):
        positions = np.arange(first, first + size)
        rows = torch.from_numpy(np.minimum(positions, len(labels) - 1))
        made.append(
            Batch(
                images=rows,
                sample_ids=rows.numpy(),
                epoch=0,
                positions=positions,
                labels=labels[rows],
                valid=positions < len(labels),
            )  # fmt: skip
        )
    return made


@pytest.mark.parametrize("classes", [3, 9])
def test_counts(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    model = Table(logits)
    order = logits.argsort(dim=1, descending=True)[:, : min(5, classes)]
    for size in (1, 7, 64):
        scores = evaluate(model, batches(labels, size), CPU)
        assert scores.images == 50
        assert scores.correct == sum(int(order[i, 0] == labels[i]) for i in range(50))
        assert scores.correct_in_5 == sum(int(labels[i] in order[i]) for i in range(50))
        assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)  # one float32 mean there
    assert scores.metrics() == {
        "val_loss": scores.loss, "val_top1_percent": 2.0 * scores.correct,
        "val_top5_percent": 2.0 * scores.correct_in_5, "val_images": 50,
    }  # fmt: skip
    assert (classes == 3) == (scores.correct_in_5 == 50)
    assert model.modes == {False} and model.training  # evaluated in eval mode, left as it was


def test_padding_that_is_no_number_does_no_harm():
    logits = torch.zeros(2, 4)
    logits[1] = float("nan")
    (batch,) = batches(torch.tensor([0, 1]), 2)
    batch.valid = np.array([True, False])
    scores = evaluate(Table(logits), [batch], CPU)
    assert scores.images == 1 and scores.loss == pytest.approx(np.log(4))
    assert evaluate(Table(logits), [], CPU).top1_percent == 0


def test_hits():
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert hits(logits, torch.tensor([2, 0])).tolist() == [[False, True, False], [True, False, False]]


def test_classes_that_differ_are_named():
    require_same_classes(["a", "b"], ["a", "b"], train="T", val="V")
    require_same_classes(None, None, train="T", val="V")
    with pytest.raises(UserError, match="classes of V have names and those of T are numbers alone.*give both as class"):
        require_same_classes(None, ["a", "b"], train="T", val="V")
    with pytest.raises(UserError, match="classes of T have names and those of V are numbers alone"):
        require_same_classes(["a", "b"], None, train="T", val="V")
    with pytest.raises(UserError, match="V has class 'c', which T lacks; V lacks class 'b'"):
        require_same_classes(["a", "b"], ["a", "c"], train="T", val="V")
    with pytest.raises(UserError, match=r"V lacks 4 classes \('b', 'c', 'd', ...\)"):
        require_same_classes(list("abcde"), ["a"], train="T", val="V")
